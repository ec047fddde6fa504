"""Families that cut pictures into tiles, and kin of LLaVA, compute what the whole model does without the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from reference import assert_close
from tiny import LLAVA_ONEVISION, TinyFamily, clip, marks, picture, shared_model
from torch import nn
from unchanged import unchanged
from zoo.tiles import ROWS

import vltok
from vltok.tokens import keep_count

METHODS = {
    "stride": vltok.StrideTokens(keep_ratio=0.4),
    "todre": vltok.ToDRE(keep_ratio=0.4, relevance=False),
}
EACH_FRAME = vltok.StrideTokens(num_keep=3, per="frame")
EACH_TILE = vltok.StrideTokens(num_keep=3, per="tile")
# The text; for each image whether it has the family's size (0) or its other size (1); how many videos.
IMAGE = ("w1 w2 <image> w3 w4", [0], 0)
TWO = ("w4 <image> w5 w6 w7 w8 <image> w9", [1, 0], 0)
ADJACENT = ("<image><image> w2", [0, 1], 0)
TEXT = ("w3 w4", [], 0)
VIDEO = ("w1 <video> w2 w3", [], 1)
MIXED = ("w5 <image> w6 <video> w7", [1], 1)
REVERSED = ("<video> w4 <video> w8 <image> w9", [0], 2)
CASES = {
    "image": [IMAGE],
    "batch": [TWO, IMAGE, TEXT],
    "adjacent": [ADJACENT, TEXT, TWO],
    "video": [VIDEO],
    "videos": [VIDEO, TEXT],
    "mixed": [MIXED, TEXT, REVERSED],
}
PAIRS = [
    pytest.param(family, name, id=f"{family.key}-{name}")
    for family in ROWS
    for name, prompts in CASES.items()
    if family.video or not any(videos for _, _, videos in prompts)
]
Prompt = tuple[str, Sequence[int], int]


@pytest.fixture(params=ROWS, ids=lambda family: family.key)
def family(request) -> TinyFamily:
    return request.param


@pytest.fixture(params=METHODS)
def method(request) -> vltok.Method:
    return METHODS[request.param]


def process(family: TinyFamily, prompts: Sequence[Prompt], first: int = 0) -> Any:
    """The inputs of some prompts, whose pictures count from `first`."""
    sizes = [size for _, own, _ in prompts for size in own]
    images = [picture(first + n, (family.size, family.other_size)[size]) for n, size in enumerate(sizes)]
    videos = [clip(first + n, family.size, family.frames) for n in range(sum(count for _, _, count in prompts))]
    return family.inputs([text for text, _, _ in prompts], images, videos=videos)


def everything(family: TinyFamily) -> list[Prompt]:
    """Prompts with all that a family takes."""
    return [TWO, IMAGE, TEXT, *([MIXED] if family.video else [])]


def lengths(family: TinyFamily, prompt: Prompt) -> list[int]:
    """Visual tokens of each picture of a prompt."""
    text, sizes, _ = prompt
    images = iter(family.tokens[size] for size in sizes)
    kinds = [word for word in text.replace("<image>", " <image> ").split() if word in ("<image>", "<video>")]
    whole = "video" in marks(shared_model(family))  # or each frame is an image
    clips = [family.clip_tokens] if whole else [family.clip_tokens // family.frames] * family.frames
    return [length for kind in kinds for length in ([next(images)] if kind == "<image>" else clips)]


@torch.no_grad()
def short_logits(
    model: nn.Module, family: TinyFamily, inputs: Any, words: torch.Tensor, gone: torch.Tensor, reindex: bool = False
) -> torch.Tensor:
    """Logits of the decoder alone on the kept tokens of each row, with words behind them; (B, T + n, vocabulary)."""
    decoder, met = oracle.decoder_of(model, family), []
    longer = oracle.longer(inputs, words)
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: met.append(kwargs), with_kwargs=True)
    try:
        logits = torch.full_like(model(**longer, use_cache=False).logits, torch.nan)
    finally:
        hook.remove()
    seen = longer["attention_mask"].bool() & ~nn.functional.pad(gone, (0, words.shape[1]))
    for row, own in enumerate(seen):
        embeds = met[0]["inputs_embeds"][row, own].unsqueeze(0)
        places = own.nonzero().T
        # The mask says that the row is one sample in spite of the gaps in its positions.
        hidden = decoder(
            inputs_embeds=embeds,
            position_ids=torch.arange(embeds.shape[1])[None] if reindex else places - places[:, :1],
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        logits[row, own] = model.lm_head(hidden)[0]
    return logits


@torch.no_grad()
def check_short(model: nn.Module, family: TinyFamily, inputs: Any, method: vltok.Method, steps: int = 6) -> None:
    """Compare a pruned model with its decoder on the kept tokens alone."""
    with vltok.apply(model, method) as handle:
        actual = model(**inputs).logits
        report = handle.report(file=None)
        words, logits = speak(model, inputs, steps)
    gone = oracle.dropped(report, oracle.placeholders(model, inputs))
    expected = short_logits(model, family, inputs, words[:, :-1], gone, method.positions == "reindex")
    seen = inputs["attention_mask"].bool() & ~gone
    assert gone.any()
    assert_close(actual[seen], expected[:, : gone.shape[1]][seen])
    assert_close(logits, expected[:, gone.shape[1] - 1 :])


def check(model: nn.Module, family: TinyFamily, inputs: Any, method: vltok.Method) -> None:
    """Compare a pruned model with the oracle that fits its decoder."""
    recurrent = oracle.is_recurrent(oracle.decoder_of(model, family))
    (check_short if recurrent else oracle.check_prefill_and_words)(model, family, inputs, method)


def speak(model: nn.Module, inputs: Any, steps: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The words that a model adds, (B, steps), and their logits, (B, steps, vocabulary)."""
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "output_logits": True} | options
    answer = model.generate(**inputs, **options, return_dict_in_generate=True)
    return answer.sequences[:, -steps:], torch.stack(answer.logits, 1)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_pruned_model_is_the_whole_one_without_the_dropped_tokens(family, name, method):
    check(shared_model(family, "eager"), family, process(family, CASES[name]), method)


def test_several_images_of_a_prompt_may_have_fewer_crops_each(method):
    """As in prompts with several images, which the processor is given prompt by prompt."""
    model, processor = shared_model(LLAVA_ONEVISION, "eager"), LLAVA_ONEVISION.processor()
    images = [picture(seed, size) for seed, size in enumerate([(112, 100), (168, 150), (112, 100)])]
    inputs = processor(
        text=["w1 <image> w2 <image> w3", "w4 <image> w5"],
        images=[images[:2], images[2:]],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    check(model, LLAVA_ONEVISION, inputs, method)
    with torch.no_grad(), vltok.apply(model, method) as handle:
        model(**inputs)
    assert handle.report(file=None).visual_tokens == [[17, 17], [88]]


def test_positions_counted_anew_are_those_of_a_short_prompt(family):
    method = vltok.StrideTokens(keep_ratio=0.4, positions="reindex")
    check_short(shared_model(family), family, process(family, everything(family)), method)


@pytest.mark.parametrize("method", [*METHODS.values(), vltok.RandomTokens(keep_ratio=0.4, seed=7)], ids=repr)
def test_a_row_of_a_padded_batch_is_that_row_alone(family, method):
    model, prompts, images, videos = shared_model(family), everything(family), 0, 0
    together = process(family, prompts)
    with torch.no_grad(), vltok.apply(model, method) as handle:
        logits = model(**together).logits
        kept = handle.report(file=None).keep_indices
        words, _ = speak(model, together)
        for row, (text, sizes, count) in enumerate(prompts):
            shown = [picture(images + n, (family.size, family.other_size)[size]) for n, size in enumerate(sizes)]
            films = [clip(videos + n, family.size, family.frames) for n in range(count)]
            images, videos = images + len(sizes), videos + count
            alone = family.inputs([text], shown, videos=films)
            own = model(**alone).logits[0]
            if kept[row]:
                picks = handle.report(file=None).keep_indices[0]
                assert all(torch.equal(a, b) for a, b in zip(picks, kept[row], strict=True))
                places = torch.arange(len(own))[
                    ~oracle.dropped(handle.report(file=None), oracle.placeholders(model, alone))[0]
                ]
            else:
                places = torch.arange(len(own))
            assert_close(logits[row, -len(own) :][places], own[places])
            assert torch.equal(speak(model, alone)[0][0], words[row])


def test_generation_without_a_cache_and_with_beams_says_the_same(family, method):
    model, inputs = shared_model(family, "eager"), process(family, everything(family))
    with torch.no_grad(), vltok.apply(model, method) as handle:
        model(**inputs)
        gone = oracle.dropped(handle.report(file=None), oracle.placeholders(model, inputs))
        greedy, greedy_logits = speak(model, inputs)
        again, again_logits = speak(model, inputs, use_cache=False)
        beams = [
            model.generate(
                **inputs,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                num_beams=2,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
            )
            for use_cache in (True, False)
        ]
    assert torch.equal(greedy, again)
    assert_close(again_logits, greedy_logits)
    words = beams[0].sequences[:, -6:]
    assert torch.equal(words, beams[1].sequences[:, -6:])
    if oracle.is_recurrent(oracle.decoder_of(model, family)):
        expected = short_logits(model, family, inputs, words[:, :-1], gone)
    else:
        with torch.no_grad(), oracle.hidden(oracle.decoder_of(model, family), gone):
            expected = model(**oracle.longer(inputs, words[:, :-1]), use_cache=False).logits
    scores = expected[:, gone.shape[1] - 1 :].log_softmax(-1).gather(-1, words[..., None]).mean((1, 2))
    assert_close(beams[0].sequences_scores, scores, 1e-4)


def test_an_image_has_one_budget_whatever_it_is_made_of(family, method):
    model, prompts = shared_model(family), [*everything(family), ADJACENT]
    with torch.no_grad(), vltok.apply(model, method) as handle:
        model(**process(family, prompts))
        report = handle.report(file=None)
    expected = [lengths(family, prompt) for prompt in prompts]
    assert report.visual_tokens == expected
    assert report.kept_tokens == [[keep_count(length, 0.4) for length in row] for row in expected]


def encode(model: nn.Module, inputs: Any) -> Any:
    """What the encoder of images returns for the pictures of some prompts."""
    text = ("input_ids", "attention_mask")
    pixels = {name.removesuffix("_images"): value for name, value in inputs.items() if name not in text}
    return model.model.get_image_features(**pixels, return_dict=True)


def budgets(family: TinyFamily, method: vltok.Method, prompt: Prompt) -> list[torch.Tensor]:
    """The tokens that are kept of each picture of a prompt."""
    model = shared_model(family)
    with torch.no_grad(), vltok.apply(model, method) as handle:
        model(**process(family, [prompt]))
    return handle.report(file=None).keep_indices[0]


def test_each_frame_has_a_budget_if_asked_for(family):
    if not family.video:
        pytest.skip("takes no videos")
    kept = torch.cat([own + 1000 * n for n, own in enumerate(budgets(family, EACH_FRAME, VIDEO))])
    length = family.clip_tokens // family.frames
    whole = "video" in marks(shared_model(family))  # or each frame is an image
    frames = kept // length if whole else kept // 1000
    # What stands behind the last frame is part of it.
    assert frames.clamp(max=family.frames - 1).bincount().tolist() == [3] * family.frames


def test_frames_are_known_where_they_have_nothing_but_patches(family):
    if "video" not in marks(shared_model(family)):
        pytest.skip("takes no videos, or takes frames for images")
    length, behind = divmod(family.clip_tokens, family.frames)
    if int(length**0.5) ** 2 != length:  # a [CLS] token stands among them
        with pytest.raises(ValueError, match="which visual tokens of a video are of which frame"):
            budgets(family, vltok.StrideFrames(num_keep=2 * length), VIDEO)
        return
    (kept,) = budgets(family, vltok.StrideFrames(num_keep=2 * length + behind), VIDEO)
    whole = kept[kept < family.frames * length].view(2, length) // length
    assert (whole == whole[:, :1]).all() and whole[0, 0] != whole[1, 0]


def test_each_tile_has_a_budget_if_asked_for(family):
    model, inputs = shared_model(family), process(family, [IMAGE])
    with torch.no_grad():
        entries = [len(each.flatten(0, -2)) for each in encode(model, inputs).pooler_output]
    (kept,) = budgets(family, EACH_TILE, IMAGE)
    tiles = torch.repeat_interleave(torch.tensor(entries))[kept]
    assert sum(entries) == family.tokens[0]
    assert tiles.bincount().tolist() == [3] * len(entries)


def test_pictures_merged_into_the_embeddings_are_pruned_alike(family, method):
    model, inputs, met = shared_model(family), process(family, everything(family)), []
    decoder = oracle.decoder_of(model, family)
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: met.append(kwargs), with_kwargs=True)
    with torch.no_grad(), vltok.apply(model, method) as handle:
        expected = model(**inputs).logits
        hook.remove()
        right = handle.report(file=None)
        merged = {"inputs_embeds": met[0]["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
        got = model(**merged).logits
        report = handle.report(file=None)
    assert report.visual_tokens == right.visual_tokens
    for row, wanted in zip(report.keep_indices, right.keep_indices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, wanted, strict=True))
    assert_close(got, expected)


def test_removing_the_handle_leaves_the_model_as_it_was(family, method):
    model, inputs = shared_model(family), process(family, everything(family))
    with torch.no_grad(), unchanged(model):
        before = model(**inputs).logits
        handle = vltok.apply(model, method)
        model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, before)
