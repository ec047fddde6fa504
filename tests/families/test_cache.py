"""What may come after a pruned prompt: right answers on its KV cache, and clear refusals where there can't be any."""

from __future__ import annotations

import copy

import pytest
import reference
import tiny
import torch
from prompts import CACHE, batch, generate, row, rows, single
from tiny import TinyFamily, shared_model
from transformers import DynamicCache, MistralConfig, Qwen2Config, StaticCache

import vltok
from vltok.engine import call as prompt
from vltok.errors import UnsupportedInputError, UnsupportedModelError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
METHODS = {
    "keep": (vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0), {"hidden_after": 2}),
    "reindex": (vltok.FasterVLM(keep_ratio=0.3, positions="reindex"), {"reindex": True}),
}


@pytest.fixture(params=METHODS)
def case(request, family):
    if request.param == "reindex" and family.name == "qwen2_5_vl":
        pytest.skip("positions on several axes are kept")
    return METHODS[request.param]


def ids(*words: int) -> torch.Tensor:
    return torch.tensor([words])


def expect(whole: reference.Row, model, picks, words, **options) -> torch.Tensor:
    """Logits of the words behind the prompt."""
    return reference.logits(reference.extend(whole, model, words), picks, **options)[0][-len(words) :]


def positions(family: TinyFamily, first: int, count: int) -> torch.Tensor:
    steps = first + torch.arange(count).unsqueeze(0)
    return steps.expand(3, 1, -1) if family.name == "qwen2_5_vl" else steps


# Right answers


@pytest.mark.parametrize("name", ["two images", "image last"])
@pytest.mark.parametrize("explicit", [False, True], ids=["without positions", "with positions"])
def test_text_goes_on_after_a_pruned_prompt(family, model, case, name, explicit):
    method, options = case
    whole = row(model, family, name)
    with vltok.apply(model, method) as handle:
        cache = model(**single(family, name), use_cache=True)[CACHE]
        report = handle.report(file=None)
        picks = report.keep_indices[0]
        if report.relevance and report.relevance[0] and not report.relevance[0][0].dropped:
            assert name == "image last"  # where no text follows the image, stage 2 has nothing to go by
            options = {}
        words, at = [9, 10, 11, 12, 13], whole.next_position
        for chunk in ([9], [10, 11, 12], [13]):
            extra = {"position_ids": positions(family, at, len(chunk))} if explicit else {}
            output = model(input_ids=ids(*chunk), **{CACHE: cache}, **extra)
            at += len(chunk)
            done = words[: words.index(chunk[-1]) + 1]
            expected = expect(whole, model, picks, done, **options)[-len(chunk) :]
            torch.testing.assert_close(output.logits[0], expected, **CLOSE)


def test_text_goes_on_after_a_padded_batch(family, model, case):
    method, options = case
    inputs = batch(family)
    words = torch.arange(8, 8 + 3 * len(inputs.input_ids)).view(-1, 3)
    fresh = torch.ones_like(words)
    fresh[0, 2] = 0  # the first row has only two new words
    with vltok.apply(model, method) as handle:
        cache = model(**inputs, use_cache=True)[CACHE]
        picks = handle.report(file=None).keep_indices
        mask = torch.cat([inputs.attention_mask, fresh], dim=1)
        first = model(input_ids=words, attention_mask=mask, **{CACHE: cache}).logits
        mask = torch.cat([mask, torch.ones_like(words)], dim=1)
        second = model(input_ids=words, attention_mask=mask, **{CACHE: cache}).logits
    for index, whole in enumerate(rows(model, family)):
        own = options if whole.images else {}
        expected = expect(whole, model, picks[index], words[index].tolist(), **own)
        torch.testing.assert_close(first[index][fresh[index].bool()], expected[fresh[index].bool()], **CLOSE)
        longer = reference.extend(whole, model, words[index].tolist() * 2)
        if index == 0:  # its hidden word takes up a position, but nobody sees it
            if "reindex" in own:
                continue
            longer = reference.without(longer, len(whole.embeds) + 2)
        torch.testing.assert_close(second[index], reference.logits(longer, picks[index], **own)[0][-3:], **CLOSE)


def test_a_cache_is_cropped_copied_and_repeated(family, model, case):
    method, options = case
    whole = row(model, family, "two images")
    with vltok.apply(model, method) as handle:
        cache = model(**single(family, "two images"), use_cache=True)[CACHE]
        picks = handle.report(file=None).keep_indices[0]
        model(input_ids=ids(9, 10, 11), **{CACHE: cache})
        branch = copy.deepcopy(cache)
        cache.crop(-2)
        cropped = model(input_ids=ids(12, 13), **{CACHE: cache}).logits
        copied = model(input_ids=ids(14), **{CACHE: branch}).logits
        cache.batch_repeat_interleave(2)
        repeated = model(input_ids=torch.tensor([[15], [16]]), **{CACHE: cache}).logits
    torch.testing.assert_close(cropped[0], expect(whole, model, picks, [9, 12, 13], **options)[-2:], **CLOSE)
    torch.testing.assert_close(copied[0], expect(whole, model, picks, [9, 10, 11, 14], **options)[-1:], **CLOSE)
    for index, word in enumerate((15, 16)):
        expected = expect(whole, model, picks, [9, 12, 13, word], **options)[-1:]
        torch.testing.assert_close(repeated[index], expected, **CLOSE)


def test_generate_goes_on_from_the_new_words_with_a_mask_of_the_whole_conversation(family, model, case):
    method, options = case
    whole, inputs = row(model, family, "two images"), single(family, "two images")
    with vltok.apply(model, method) as handle:
        output = model(**inputs, use_cache=True)
        picks = handle.report(file=None).keep_indices[0]
        mask = torch.ones(1, inputs.input_ids.shape[1] + 2, dtype=torch.long)
        turn = {"input_ids": ids(9, 10), "attention_mask": mask, CACHE: output[CACHE]}
        words = generate(model, turn)[0].tolist()
    assert words == reference.greedy(reference.extend(whole, model, [9, 10]), model, picks, 5, **options)


# Refusals


@pytest.fixture
def handle(model):
    with vltok.apply(model, METHODS["keep"][0]) as handle:
        yield handle


def test_a_prefill_in_chunks_is_right_where_the_images_are_in_one_and_refused_elsewhere(family, model, handle):
    inputs = single(family, "text around")
    expected = generate(model, inputs)
    length = inputs.input_ids.shape[1]
    assert torch.equal(generate(model, inputs, prefill_chunk_size=length - 1), expected)
    with pytest.raises(UnsupportedInputError, match="don't fit the images encoded last"):
        generate(model, inputs, prefill_chunk_size=8)
    with pytest.raises(UnsupportedInputError, match="filled KV cache"):
        generate(model, inputs, prefill_chunk_size=2)
    assert torch.equal(generate(model, inputs), expected)


def test_images_on_top_of_a_filled_cache_are_refused(family, model, handle):
    cache = model(input_ids=ids(9, 10), use_cache=True)[CACHE]
    with pytest.raises(UnsupportedInputError, match="whole conversation with a fresh"):
        model(**single(family, "two images"), **{CACHE: cache})
    cache = model(**single(family, "text around"), use_cache=True)[CACHE]
    with pytest.raises(UnsupportedInputError, match="whole conversation with a fresh"):
        model(**single(family, "two images"), **{CACHE: cache})


def test_static_caches_are_refused(family, model, handle):
    inputs = single(family, "two images")
    with pytest.raises(UnsupportedInputError, match="StaticCache reserves room"):
        generate(model, inputs, cache_implementation="static")
    with pytest.raises(UnsupportedInputError, match="StaticCache reserves room"):
        model(**inputs, **{CACHE: StaticCache(config=model.config.get_text_config(), max_cache_len=200)})


def test_ready_made_attention_maps_and_hidden_images_are_refused(family, model, handle):
    inputs = single(family, "two images")
    length = inputs.input_ids.shape[1]
    with pytest.raises(UnsupportedInputError, match="two-dimensional attention_mask"):
        model(**{**inputs, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).tril()})
    hidden = torch.ones(1, length, dtype=torch.long)
    hidden[0, length // 2 - 4 : length // 2 + 4] = 0
    positions = {"position_ids": torch.arange(length).unsqueeze(0)}  # else Qwen's own counting fails first
    with pytest.raises(UnsupportedInputError, match="hides image placeholders"):
        model(**{**inputs, "attention_mask": hidden, **positions})


def test_images_encoded_elsewhere_are_refused(family, model):
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    inputs, other = (single(family, name) for name in ("two images", "adjacent images"))
    encoded = model.model.get_image_features(**{k: inputs[k] for k in names if k in inputs}, return_dict=True)
    given = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_sizes")}
    given["mm_encoder_outputs"] = {"image": encoded}
    expected = model(**given).logits
    with vltok.apply(model, METHODS["keep"][0]):
        with pytest.raises(UnsupportedInputError, match="before the method was attached"):
            model(**given)
        model(**other)
        with pytest.raises(UnsupportedInputError, match="don't fit the images encoded last"):
            model(**given)
        swapped = dict(inputs)
        swapped["pixel_values"] = inputs["pixel_values"].flip(-1)
        model(**swapped)
        with pytest.raises(UnsupportedInputError, match="not the ones this model encoded last"):
            model(**given)
        assert torch.equal(model(**inputs).logits, model(**given).logits)
    assert torch.equal(model(**given).logits, expected)


def test_generate_on_a_pruned_cache_is_refused_where_it_counts_entries(family, model, handle):
    inputs = single(family, "two images")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([output.sequences, ids(9, 10)], dim=1)
    for given in (turn, turn[:, -3:], turn[:, -1:]):
        with pytest.raises(UnsupportedInputError, match="generate\\(\\) can't take up a pruned cache"):
            generate(model, {"input_ids": given, CACHE: copy.deepcopy(output[CACHE])})
    whole = {**inputs, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
    if "mm_token_type_ids" in inputs:
        new = turn.shape[1] - inputs.input_ids.shape[1]
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs.mm_token_type_ids, (0, new))
    with pytest.raises(UnsupportedInputError, match="filled KV cache"):
        generate(model, {**whole, CACHE: copy.deepcopy(output[CACHE])})
    assert generate(model, whole).shape == (1, 5), "with a fresh cache the conversation goes on"


def test_words_that_do_not_follow_the_pruned_prompt_are_refused(family, model, handle):
    inputs = single(family, "two images")
    cache = model(**inputs, use_cache=True)[CACHE]
    held = cache.get_seq_length()
    for extra in ({"position_ids": positions(family, held, 1)}, {"attention_mask": torch.ones(1, held + 1)}):
        with pytest.raises(UnsupportedInputError, match="attention_mask or position_ids say otherwise"):
            model(input_ids=ids(9), **{CACHE: cache}, **extra)
    twice = model(**batch(family, names=["two images", "two images"]), use_cache=True)[CACHE]
    with pytest.raises(UnsupportedInputError, match="2 rows, but 3 rows"):
        model(input_ids=ids(9).expand(3, -1), **{CACHE: twice})
    with pytest.raises(UnsupportedInputError, match="through the whole model"):
        model.model.language_model(input_ids=ids(9), **{CACHE: cache})
    expected = model(input_ids=ids(9), **{CACHE: copy.deepcopy(cache)}).logits
    cache.crop(-1)
    with pytest.raises(UnsupportedInputError, match="cropped back to its prompt"):
        model(input_ids=ids(9), **{CACHE: cache})
    fresh = model(**inputs, **{CACHE: DynamicCache()}, use_cache=True)[CACHE]
    torch.testing.assert_close(model(input_ids=ids(9), **{CACHE: fresh}).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (tiny.LLAVA, MistralConfig(**tiny.TEXT, sliding_window=8)),
        (tiny.LLAVA_NEXT, MistralConfig(**tiny.TEXT, sliding_window=8)),
        (tiny.INTERNVL, Qwen2Config(**tiny.TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2)),
        (tiny.QWEN2_5_VL, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_sliding_window_decoders_are_refused(family, text):
    config = copy.deepcopy(shared_model(family).config)
    if isinstance(text, dict):
        text = type(config.text_config)(**(config.text_config.to_dict() | text | {"layer_types": None}))
    config.text_config = text
    model = type(shared_model(family))(config)
    with pytest.raises(UnsupportedModelError, match="sliding-window or chunked attention"):
        vltok.apply(model, vltok.RandomTokens(keep_ratio=0.5))


def test_a_fault_words_counted_by_cache_entries_is_caught(family, model, monkeypatch):
    """The deliberate fault of this file: words go on behind the cache entries, as if nothing had been dropped."""
    whole = row(model, family, "two images")

    def mismatch() -> float:
        with vltok.apply(model, METHODS["keep"][0]) as handle:
            cache = model(**single(family, "two images"), use_cache=True)[CACHE]
            picks = handle.report(file=None).keep_indices[0]
            logits = model(input_ids=ids(9, 10), **{CACHE: cache}).logits[0]
        return float((logits - expect(whole, model, picks, [9, 10], hidden_after=2)).abs().max())

    assert mismatch() < 2e-5
    entries = sum(map(len, whole.images)) // 3
    monkeypatch.setattr(prompt, "next_position", lambda position_ids: torch.tensor([entries]))
    assert mismatch() > 1e-2
