"""What may come after a pruned prompt: right answers on its KV cache, and clear refusals where there can't be any."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from prompts import CACHE, batch, generate, row, rows, single
from reference import assert_close
from tiny import TinyFamily
from transformers import StaticCache
from versions import chunks_prompts_with_images

import vltok
from vltok.errors import UnsupportedInputError

METHODS = {
    "keep": (vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0), {"hidden_after": 2}),
    "reindex": (vltok.FasterVLM(keep_ratio=0.3, positions="reindex"), {"reindex": True}),
}


@pytest.fixture(params=METHODS)
def case(request, family):
    if METHODS[request.param][0].positions == "reindex" and family.axes > 1:
        pytest.skip("positions on several axes are kept")
    return METHODS[request.param]


def ids(*words: int) -> torch.Tensor:
    return torch.tensor([words])


def expect(whole: reference.Row, model, picks, words, **options) -> torch.Tensor:
    """Logits of the words behind the prompt."""
    return reference.logits(reference.extend(whole, model, words), picks, **options)[0][-len(words) :]


def positions(family: TinyFamily, first: int, count: int) -> torch.Tensor:
    steps = first + torch.arange(count).unsqueeze(0)
    return steps.expand(family.axes, 1, -1) if family.axes > 1 else steps


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
            assert_close(output.logits[0], expected)


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
        assert_close(first[index][fresh[index].bool()], expected[fresh[index].bool()])
        longer = reference.extend(whole, model, words[index].tolist() * 2)
        if index == 0:  # its hidden word takes up a position, but nobody sees it
            if "reindex" in own:
                continue
            longer = reference.without(longer, len(whole.embeds) + 2)
        assert_close(second[index], reference.logits(longer, picks[index], **own)[0][-3:])


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
    assert_close(cropped[0], expect(whole, model, picks, [9, 12, 13], **options)[-2:])
    assert_close(copied[0], expect(whole, model, picks, [9, 10, 11, 14], **options)[-1:])
    for index, word in enumerate((15, 16)):
        expected = expect(whole, model, picks, [9, 12, 13, word], **options)[-1:]
        assert_close(repeated[index], expected)


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


@chunks_prompts_with_images
@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_prefill_in_chunks_is_right_or_refused_by_its_name(family, model, handle, size):
    inputs = single(family, "text around")
    expected, length = generate(model, inputs), inputs.input_ids.shape[1]
    assert torch.equal(generate(model, inputs, prefill_chunk_size=length - 1), expected)
    try:
        chunked = generate(model, inputs, prefill_chunk_size=size)
    except UnsupportedInputError as error:
        assert "prefill_chunk_size" in str(error)
    else:
        assert torch.equal(chunked, expected)
    assert torch.equal(generate(model, inputs), expected)


def test_static_caches_are_refused(family, model, handle):
    inputs = single(family, "two images")
    with pytest.raises(UnsupportedInputError, match="StaticCache reserves room"):
        generate(model, inputs, cache_implementation="static")
    with pytest.raises(UnsupportedInputError, match="StaticCache reserves room"):
        model(**inputs, **{CACHE: StaticCache(config=model.config.get_text_config(), max_cache_len=200)})


def test_hidden_images_are_refused(family, model, handle):
    inputs = single(family, "two images")
    length = inputs.input_ids.shape[1]
    hidden = torch.ones(1, length, dtype=torch.long)
    hidden[0, length // 2 - 4 : length // 2 + 4] = 0
    at = {"position_ids": torch.arange(length).unsqueeze(0)}  # else Qwen's own counting fails first
    with pytest.raises(UnsupportedInputError, match="hides image placeholders"):
        model(**{**inputs, "attention_mask": hidden, **at})


def test_words_that_do_not_follow_the_pruned_prompt_are_refused(family, model, handle):
    inputs = single(family, "two images")
    cache = model(**inputs, use_cache=True)[CACHE]
    entries = min(layer.keys.shape[-2] for layer in cache.layers)
    with pytest.raises(UnsupportedInputError, match="one for each of the"):
        model(input_ids=ids(9), attention_mask=torch.ones(1, entries + 1), **{CACHE: cache})
    twice = model(**batch(family, names=["two images", "two images"]), use_cache=True)[CACHE]
    with pytest.raises(UnsupportedInputError, match="2 rows, but 3 rows"):
        model(input_ids=ids(9).expand(3, -1), **{CACHE: twice})
    with pytest.raises(UnsupportedInputError, match="through the whole model"):
        model.model.language_model(input_ids=ids(9), **{CACHE: copy.deepcopy(cache)})
    expected = model(input_ids=ids(9), **{CACHE: copy.deepcopy(cache)}).logits
    again = model(**inputs, use_cache=True)[CACHE]
    assert_close(model(input_ids=ids(9), **{CACHE: again}).logits, expected)


def test_a_fault_words_counted_by_cache_entries_is_caught(family, model):
    """The deliberate fault of this file: words go on behind the cache entries, as if nothing had been dropped."""
    whole = row(model, family, "two images")
    left_out = sum(map(len, whole.images)) * 2 // 3

    def wrong(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 2:
            return None
        return args, {**kwargs, "position_ids": kwargs["position_ids"] - left_out}

    def mismatch() -> float:
        cache = model(**single(family, "two images"), use_cache=True)[CACHE]
        logits = model(input_ids=ids(9, 10), **{CACHE: cache}).logits[0]
        return float((logits - expect(whole, model, picks, [9, 10], hidden_after=2)).abs().max())

    with vltok.apply(model, METHODS["keep"][0]) as handle:
        model(**single(family, "two images"))
        picks = handle.report(file=None).keep_indices[0]
        assert mismatch() < 1e-4
        hook = model.model.language_model.register_forward_pre_hook(wrong, with_kwargs=True)
        try:
            assert mismatch() > 1e-2
        finally:
            hook.remove()
