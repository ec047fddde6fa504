"""The Qwen-VL line and its kin: pictures of any size, videos, towers that merge patches, decoders of all kinds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from oracle import check_prefill_and_words, decoder_of, dropped, is_recurrent, longer, placeholders
from reference import assert_close
from tiny import QWEN2_5_VL, TinyFamily, clip, picture, shared_model
from zoo.qwen import MINIMAX_M3_VL_SPARSE, ROWS, VIDEO_LLAMA_3

import vltok
from vltok.errors import UnsupportedModelError
from vltok.tokens import keep_count

STRIDE = vltok.StrideTokens(keep_ratio=0.4)
METHODS = {"stride": STRIDE, "todre": vltok.ToDRE(keep_ratio=0.4, relevance=False)}
STEPS = 6
# What is written, and the pictures: size 0 or 1, "v" for a video.
PROMPTS = {
    "image": [("w1 <image> w2 w3", [0])],
    "batch": [("w4 <image> w5 w6 <image> w7", [1, 0]), ("w1 <image> w2", [0]), ("w3 w8", [])],
    "video": [("w1 <video> w2 w3", ["v"])],
    "mixed": [("w5 <image> w1 <video> w2", [0, "v"]), ("w4 <video> w9 <image> w6", ["v", 1]), ("w7 <image> w1", [0])],
}


def ask(family: TinyFamily, prompts: list[tuple[str, list]]):
    """The inputs of some prompts. Equal prompts have equal pictures in any batch."""
    images, videos = [], []
    for text, own in prompts:
        for number, size in enumerate(own):
            seed = 7 * len(text) + number
            if size == "v":
                videos.append(clip(seed, family.size, family.frames))
            else:
                images.append(picture(seed, (family.size, family.other_size)[size]))
    return family.inputs([text for text, _ in prompts], images, videos=videos)


def lengths(family: TinyFamily, prompts: list[tuple[str, list]]) -> list[list[int]]:
    """Visual tokens of each picture."""
    return [[family.clip_tokens if size == "v" else family.tokens[size] for size in own] for _, own in prompts]


def words(model, inputs, **options) -> torch.Tensor:
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, -STEPS:]


def alone(whole: torch.nn.Module, family: TinyFamily, inputs, gone: torch.Tensor, reindex: bool) -> list[torch.Tensor]:
    """Logits of the tokens left of each row, (T, V) each: the unpruned model whose decoder is given these alone.

    They keep their positions, or, with `reindex`, have those of a prompt without the others.
    """

    logits = []
    for row, left in enumerate(inputs["attention_mask"].bool() & ~gone):
        cut = functools.partial(only, row, left, reindex)
        hook = decoder_of(whole, family).register_forward_pre_hook(cut, with_kwargs=True)
        try:
            logits.append(whole(**inputs, use_cache=False).logits[0])
        finally:
            hook.remove()
    return logits


def only(row: int, left: torch.Tensor, reindex: bool, _: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a decoder these tokens of a row alone."""
    embeds, positions = kwargs["inputs_embeds"][row : row + 1, left], kwargs.get("position_ids")
    positions = None if reindex else positions[..., row : row + 1, left]
    return args, {**kwargs, "inputs_embeds": embeds, "position_ids": positions, "attention_mask": None}


# Layers that hold a state sum up in another order word by word: the unpruned models are 3e-5 off themselves.
ROUNDING = {True: 1e-4, False: 1e-5}


def tolerance(model, family: TinyFamily) -> float:
    return ROUNDING[is_recurrent(decoder_of(model, family))]


def check_against_short(model, family: TinyFamily, inputs, method: vltok.Method) -> None:
    """Compare a pruned model with its decoder alone: logits of the kept tokens, and those of words behind them."""
    visual, reindex = placeholders(model, inputs), method.positions == "reindex"
    with vltok.apply(model, method) as handle:
        actual = model(**inputs).logits
        gone = dropped(handle.report(file=None), visual)
        answer = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert gone.any()
    said = torch.stack(answer.logits, 1)
    whole = longer(inputs, answer.sequences[:, -STEPS:-1])
    hidden = torch.nn.functional.pad(gone, (0, STEPS - 1))
    for row, expected in enumerate(alone(model, family, whole, hidden, reindex)):
        left = inputs["attention_mask"][row].bool() & ~gone[row]
        assert_close(actual[row, left], expected[: 1 - STEPS], tolerance(model, family))
        assert_close(said[row], expected[-STEPS:], tolerance(model, family))


def check(model, family: TinyFamily, inputs, method: vltok.Method) -> None:
    """Compare with the oracle that fits the decoder."""
    if method.positions == "reindex" or is_recurrent(decoder_of(model, family)):
        check_against_short(model, family, inputs, method)
    else:
        check_prefill_and_words(model, family, inputs, method, STEPS)


def can(family: TinyFamily, name: str) -> bool:
    return bool(family.video) and (name != "mixed" or family.mixes) if name in ("video", "mixed") else True


CASES = [(family, name) for family in [QWEN2_5_VL, *ROWS] for name in PROMPTS if can(family, name)]
BY_CASE = pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family.key}-{name}" for family, name in CASES])
BY_FAMILY = pytest.mark.parametrize("family", [QWEN2_5_VL, *ROWS], ids=lambda family: family.key)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@BY_CASE
def test_a_pruned_model_answers_as_if_the_dropped_tokens_were_not_there(family, name, method):
    check(shared_model(family, "eager"), family, ask(family, PROMPTS[name]), method)


@BY_CASE
def test_each_picture_has_one_budget(family, name):
    model, prompts = shared_model(family, "eager"), PROMPTS[name]
    with vltok.apply(model, STRIDE) as handle:
        model(**ask(family, prompts))
        report = handle.report(file=None)
    assert report.visual_tokens == lengths(family, prompts)
    assert report.kept_tokens == [[keep_count(n, 0.4, None) for n in row] for row in lengths(family, prompts)]


@BY_FAMILY
def test_videos_side_by_side_have_budgets_of_their_own(family):
    """Also where a video comes as several entries, whose times tell where the next one begins."""
    if not family.video:
        pytest.skip("takes no videos")
    times = {"video_metadata": [{"total_num_frames": 4, "fps": 24, "frames_indices": [0, 1, 2, 3]}] * 3}
    processor = functools.partial(family.processor(), videos_kwargs=times)
    videos = [clip(seed, family.size, family.frames) for seed in range(3)]
    inputs = family.inputs(["w1 <video><video> w2", "w3 <video> w4"], videos=videos, processor=processor)
    model = shared_model(family, "eager")
    check(model, family, inputs, STRIDE)
    with vltok.apply(model, STRIDE) as handle:
        model(**inputs)
        assert handle.report(file=None).visual_tokens == [[family.clip_tokens] * 2, [family.clip_tokens]]


def test_video_tokens_that_the_model_itself_leaves_out_are_no_tokens():
    """VideoLLaMA 3 leaves out what doesn't change from one frame to the next, but for a token a frame."""
    model, family = shared_model(VIDEO_LLAMA_3, "eager"), VIDEO_LLAMA_3
    frames = [clip(seed, family.size, family.frames) for seed in range(2)]
    frames[0][1], frames[0][3] = frames[0][0], frames[0][2]
    inputs = family.inputs(["w1 <video> w2 <image> w3", "w4 <video> w5"], [picture(0, family.size)], videos=frames)
    check(model, family, inputs, STRIDE)
    with vltok.apply(model, STRIDE) as handle:
        model(**inputs)
        assert handle.report(file=None).visual_tokens == [[10, 12], [16]]
        assert torch.equal(words(model, inputs), words(model, inputs, use_cache=False))


@BY_CASE
def test_a_row_of_a_padded_batch_equals_the_row_alone(family, name):
    model, prompts = shared_model(family), [*PROMPTS[name], ("w3", [])]
    inputs = ask(family, prompts)
    with vltok.apply(model, METHODS["todre"]):
        together, said = model(**inputs).logits, words(model, inputs)
        for row, prompt in enumerate(prompts):
            single = ask(family, [prompt])
            begin = together.shape[1] - single["input_ids"].shape[1]
            visual = placeholders(model, single)[0]
            expected = model(**single).logits[0][~visual]
            assert_close(together[row, begin:][~visual], expected, tolerance(model, family))
            assert torch.equal(said[row], words(model, single)[0])


@BY_CASE
def test_words_are_the_same_without_a_cache_and_with_beams(family, name):
    model, inputs = shared_model(family), ask(family, PROMPTS[name])
    with vltok.apply(model, METHODS["todre"]):
        assert torch.equal(words(model, inputs), words(model, inputs, use_cache=False))
        beams = words(model, inputs, num_beams=2)
        assert torch.equal(beams, words(model, inputs, num_beams=2, use_cache=False))


@BY_CASE
def test_a_model_is_its_old_self_when_the_handle_is_removed(family, name):
    model, inputs = shared_model(family), ask(family, PROMPTS[name])
    before, said = model(**inputs).logits, words(model, inputs)
    with vltok.apply(model, STRIDE):
        assert not torch.equal(model(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(words(model, inputs), said)


@BY_FAMILY
def test_frames_of_a_video_have_budgets_of_their_own(family):
    if not family.video:
        pytest.skip("takes no videos")
    model, inputs = shared_model(family, "eager"), ask(family, PROMPTS["mixed"])
    method = vltok.StrideTokens(num_keep=2, per="frame")
    check(model, family, inputs, method)
    with vltok.apply(model, method) as handle:
        model(**inputs)
        frames = {24: 2, 16: 4}[
            family.clip_tokens
        ]  # that these tokens form: most towers merge two of the four into one
        assert handle.report(file=None).kept_tokens == [[2, 2 * frames], [2 * frames, 2], [2]]


@BY_CASE
def test_positions_counted_anew_are_those_of_a_short_prompt(family, name):
    model, method = shared_model(family, "eager"), vltok.StrideTokens(keep_ratio=0.4, positions="reindex")
    if family.axes > 1:
        with pytest.raises(ValueError, match="positions on several axes"):
            vltok.apply(model, method)
    else:
        check(model, family, ask(family, PROMPTS[name]), method)


@pytest.mark.zoo
def test_attention_behind_an_indexer_is_not_read():
    """What is read would not be what the layer does."""
    model = shared_model(MINIMAX_M3_VL_SPARSE)
    with pytest.raises(UnsupportedModelError, match="leaves keys out by an indexer"):
        vltok.apply(model, vltok.ToDRE(keep_ratio=0.4, depth=0.5))
    with vltok.apply(model, vltok.ToDRE(stages=(2,), tau=1.0, depth=0.25)) as handle:  # after the layer without one
        model(**ask(MINIMAX_M3_VL_SPARSE, PROMPTS["image"]))
        assert handle.report(file=None).relevance[0][0].layer == 1
