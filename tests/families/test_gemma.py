"""Pruning of SmolVLM, Idefics2 and 3, Gemma 3 and 4, PaliGemma, Mistral 3 and LightOnOCR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from reference import assert_close
from tiny import TinyFamily, clip, picture, shared_model
from torch import nn
from unchanged import unchanged
from zoo.gemma import APART, IDEFICS3, ROWS, SMOLVLM

import vltok
from vltok.errors import UnsupportedModelError

METHODS = {"stride": vltok.StrideTokens(keep_ratio=0.4), "todre": vltok.ToDRE(keep_ratio=0.4, relevance=False)}
ONE = ["w1 w2 <image> w3 w4 w5"]
BATCH = ["w1 <image> w2 <image> w3 w4", "w5 w6 <image> w7 w8 w9", "w10 w11 w12"]
VIDEO = ["w1 <video> w2 w3"]
VIDEOS = ["w1 <video> w2 w3", "w4 w5 <video> w6"]
MIXED = ["w1 <image> w2 <video> w3", "w4 <image> w5 w6", "w7 <video> w8 <image> w9"]
STEPS = 6

with_video = [row for row in ROWS if row.video]


def by_key(rows: Sequence[TinyFamily]) -> Any:
    return pytest.mark.parametrize("family", rows, ids=lambda row: row.key)


def inputs_of(family: TinyFamily, prompts: Sequence[str], first: Sequence[int] = (0, 0)) -> Any:
    """The inputs of some prompts; images have both sizes in turn, numbers of images and videos begin at `first`."""
    images, videos = (
        range(number, number + sum(prompt.count(mark) for prompt in prompts))
        for number, mark in zip(first, ("<image>", "<video>"), strict=True)
    )
    pictures = [picture(n, family.other_size if n % 2 else family.size) for n in images]
    return family.inputs(prompts, pictures, videos=[clip(n, family.size, family.frames) for n in videos])


def alone(family: TinyFamily, prompts: Sequence[str], row: int, inputs: Any) -> Any:
    """The inputs of one of some prompts, without padding."""
    first = [sum(prompt.count(mark) for prompt in prompts[:row]) for mark in ("<image>", "<video>")]
    if "<" in prompts[row]:
        return inputs_of(family, [prompts[row]], first)
    shape, real = inputs["input_ids"].shape, inputs["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in inputs.items() if value.shape == shape}


def words(model: nn.Module, inputs: Any, **options: Any) -> Any:
    given = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **given, output_logits=True, **options)


def lengths_of(family: TinyFamily, prompts: Sequence[str]) -> list[list[int]]:
    """Visual tokens of each picture of some prompts."""
    rows, images = [], 0
    for prompt in prompts:
        rows.append([])
        for word in prompt.split():
            if word == "<image>":
                kind, tokens, images = "image", family.tokens[images % 2], images + 1
            elif word == "<video>":
                kind, tokens = "video", family.clip_tokens
            else:
                continue
            each = APART.get((family.key, kind), tokens)
            rows[-1] += [each] * (tokens // each)
    return rows


@pytest.mark.parametrize("prompts", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@by_key(ROWS)
def test_images_are_pruned_as_if_tokens_were_hidden(family, method, prompts):
    oracle.check_prefill_and_words(shared_model(family, "eager"), family, inputs_of(family, prompts), method)


@pytest.mark.parametrize("prompts", [VIDEO, VIDEOS], ids=["one", "batch"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@by_key(with_video)
def test_videos_are_pruned_as_if_tokens_were_hidden(family, method, prompts):
    oracle.check_prefill_and_words(shared_model(family, "eager"), family, inputs_of(family, prompts), method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@by_key([row for row in with_video if row.mixes])
def test_images_and_videos_are_pruned_together(family, method):
    oracle.check_prefill_and_words(shared_model(family, "eager"), family, inputs_of(family, MIXED), method)


def check_rows(family: TinyFamily, prompts: Sequence[str], method: vltok.Method) -> None:
    """Compare the rows of a padded batch with the rows alone."""
    model, inputs = shared_model(family), inputs_of(family, prompts)
    with vltok.apply(model, method):
        logits, answers = model(**inputs).logits, words(model, inputs)
        for row in range(len(prompts)):
            own = alone(family, prompts, row, inputs)
            whole = model(**own).logits[0]
            seen = inputs["attention_mask"][row].bool()
            assert_close(logits[row][seen], whole)
            answer = words(model, own)
            assert answer.sequences[0, -STEPS:].tolist() == answers.sequences[row, -STEPS:].tolist()
            assert_close(torch.stack(answers.logits, 1)[row], torch.stack(answer.logits, 1)[0])


RANDOM = vltok.RandomTokens(keep_ratio=0.4)  # its picks depend on the pixels


@pytest.mark.parametrize("method", [*METHODS.values(), RANDOM], ids=[*METHODS, "random"])
@by_key(ROWS)
def test_rows_of_a_padded_batch_equal_the_rows_alone(family, method):
    check_rows(family, BATCH, method)


@by_key(with_video)
def test_rows_with_videos_equal_the_rows_alone(family):
    check_rows(family, VIDEOS, RANDOM)


@by_key([row for row in with_video if row.mixes])
def test_rows_with_images_and_videos_equal_the_rows_alone(family):
    check_rows(family, MIXED, RANDOM)


@by_key(ROWS)
def test_words_are_the_same_with_and_without_a_cache(family):
    model, inputs = shared_model(family), inputs_of(family, BATCH)
    with vltok.apply(model, METHODS["stride"]):
        cached, whole = words(model, inputs), words(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    assert_close(torch.stack(cached.logits, 1), torch.stack(whole.logits, 1))


@by_key(ROWS)
def test_beams_are_those_of_the_model_that_tokens_are_hidden_from(family):
    eager, inputs = shared_model(family, "eager"), inputs_of(family, BATCH)
    with vltok.apply(eager, METHODS["stride"]) as handle:
        actual = words(eager, inputs, num_beams=2, output_scores=True)
        gone = oracle.dropped(handle.report(file=None), oracle.placeholders(eager, inputs).repeat_interleave(2, 0))
    with oracle.hidden(oracle.decoder_of(eager, family), gone):
        expected = words(eager, inputs, num_beams=2, output_scores=True, use_cache=False)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(actual.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("prompts", [BATCH, VIDEOS, MIXED], ids=["images", "videos", "both"])
@by_key(ROWS)
def test_the_report_has_one_budget_for_each_picture(family, prompts):
    if "<video>" in "".join(prompts) and not family.video:
        pytest.skip("takes no videos")
    if prompts is MIXED and not family.mixes:
        pytest.skip("takes images or videos")
    model = shared_model(family)
    expected = lengths_of(family, prompts)
    with vltok.apply(model, METHODS["stride"]) as handle:
        model(**inputs_of(family, prompts))
        report = handle.report(file=None)
    assert report.visual_tokens == expected
    budget = METHODS["stride"].budget
    assert report.kept_tokens == [[budget(length, None, "image") for length in row] for row in expected]


@by_key(ROWS)
def test_removing_leaves_the_model_as_it_was(family):
    model, inputs = family.model(), inputs_of(family, ONE)
    before, weights = model(**inputs).logits, {name: each.clone() for name, each in model.state_dict().items()}
    hooks = hooks_of(model)
    handle = vltok.apply(model, METHODS["stride"])
    assert not torch.equal(model(**inputs).logits, before)
    handle.remove()
    assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert hooks_of(model) == hooks


def hooks_of(model: nn.Module) -> list[Any]:
    """All hooks of a model."""
    pairs = [(module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    return [hook for pair in pairs for hooks in pair for hook in hooks.values()]


@by_key([row for row in ROWS if not row.shares_keys])
def test_attention_inside_the_decoder_is_what_the_eager_model_shows(family):
    model, inputs = shared_model(family, "eager"), inputs_of(family, ONE)
    with vltok.apply(model, vltok.ToDRE(stages=(2,), tau=0.0, depth=(0.25, 0.5, 0.75))) as handle:
        model(**inputs)
        records = handle.report(file=None).relevance[0]
    visual = oracle.placeholders(model, inputs)[0]
    text = ~visual & (visual.cumsum(0) > 0)
    maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    assert [record.layer for record in records] == [1, 2, 3]
    for record in records:
        attention = maps[record.layer - 1][0].mean(0)
        assert record.alpha_tv == pytest.approx(float(attention[text][:, visual].sum() / text.sum()), abs=1e-6)
        assert record.alpha_vt == pytest.approx(float(attention[visual][:, text].sum() / visual.sum()), abs=1e-6)


@by_key([row for row in ROWS if row.shares_keys])
def test_tokens_can_not_be_dropped_where_later_layers_share_keys(family):
    model = shared_model(family)
    with unchanged(model), pytest.raises(UnsupportedModelError, match="would still be seen there"):
        vltok.apply(model, vltok.ToDRE(keep_ratio=0.4))


@by_key([row for row in ROWS if not row.shares_keys])
def test_tokens_dropped_inside_the_decoder_stay_away_from_later_words(family):
    model, inputs = shared_model(family), inputs_of(family, BATCH)
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.4, tau=1.0, depth=0.5)) as handle:
        cached, report = words(model, inputs), handle.report(file=None)
        whole = words(model, inputs, use_cache=False)
    assert (report.tokens_per_layer[:2, 3] < report.tokens_per_layer[:2, 0]).all()
    assert torch.equal(cached.sequences, whole.sequences)
    assert_close(torch.stack(cached.logits, 1), torch.stack(whole.logits, 1))


def kept_alone(model: nn.Module, family: TinyFamily, inputs: Any, kept: torch.Tensor) -> torch.Tensor:
    """Logits of the kept tokens, (T,), bool, where nothing else was ever in the prompt.

    The model gets the embeddings that its decoder would get, and what came along with them.
    """
    seen: dict[str, Any] = {}

    def see(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs)

    hook = oracle.decoder_of(model, family).register_forward_pre_hook(see, with_kwargs=True)
    model(**inputs)
    hook.remove()
    shape = inputs["input_ids"].shape
    short = {name: inputs[name][:, kept] for name in inputs if inputs[name].shape == shape and name != "labels"}
    del short["input_ids"]
    extra = {name: seen[name][:, kept] for name in ("inputs_embeds", "per_layer_inputs") if seen.get(name) is not None}
    return model(**short, **extra).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@by_key(ROWS)
def test_counted_anew_the_kept_tokens_are_a_prompt_of_their_own(family, attention):
    model, inputs = shared_model(family, attention), inputs_of(family, ONE)
    method = vltok.StrideTokens(keep_ratio=0.4, positions="reindex")
    with vltok.apply(model, method) as handle:
        actual = model(**inputs).logits
        report = handle.report(file=None)
    kept = ~oracle.dropped(report, oracle.placeholders(model, inputs))[0]
    assert_close(actual[:, kept], kept_alone(model, family, inputs, kept))


@by_key([IDEFICS3, SMOLVLM])
def test_tiles_may_have_budgets_of_their_own(family):
    model = shared_model(family)
    with vltok.apply(model, vltok.StrideTokens(keep_ratio=0.4, per="tile")) as handle:
        model(**inputs_of(family, BATCH))
        report = handle.report(file=None)
    assert report.visual_tokens == lengths_of(family, BATCH)
    tiles = [(kept // 9).bincount().tolist() for row in report.keep_indices for kept in row]
    each = METHODS["stride"].budget(9, None, "image")
    assert tiles == [[each] * 3, [each] * 5, [each] * 3]


@by_key([row for row in with_video if (row.key, "video") not in APART])
def test_frames_may_have_budgets_of_their_own(family):
    model = shared_model(family)
    with vltok.apply(model, vltok.StrideTokens(keep_ratio=0.4, per="frame")) as handle:
        model(**inputs_of(family, MIXED))
        report = handle.report(file=None)
    size = family.clip_tokens // family.frames
    videos = [report.keep_indices[0][1], report.keep_indices[2][0]]
    each = METHODS["stride"].budget(size, None, "video")
    assert [(kept // size).bincount().tolist() for kept in videos] == [[each] * family.frames] * 2
    assert report.kept_tokens[0][0] == METHODS["stride"].budget(family.tokens[0], None, "image")
