"""The families of `zoo.glm`: pruned models against oracles that know nothing of the engine."""

from __future__ import annotations

import oracle
import pytest
import torch
from calls import fingerprint
from reference import assert_close
from tiny import TinyFamily, clip, picture, shared_model
from zoo.glm import ROWS
from zoo.short import logits_of_kept

import vltok
from vltok.errors import UnsupportedInputError

METHODS = [vltok.StrideTokens(keep_ratio=0.4), vltok.ToDRE(keep_ratio=0.4, relevance=False)]
STRIDE = METHODS[0]
BATCH = ["w4 <image> w5 w6 <image> w7", "w1 w2 <image> w3", "w3 w4"]
CLIPS = ["w1 <video> w2 w3 <video> w4", "w5 <video> w6"]

by_video = pytest.mark.parametrize("family", [row for row in ROWS if row.video], ids=lambda family: family.key)
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


@pytest.fixture(params=ROWS, ids=lambda family: family.key)
def family(request) -> TinyFamily:
    return request.param


@pytest.fixture
def eager(family) -> torch.nn.Module:
    return shared_model(family, "eager")


@pytest.fixture
def model(family) -> torch.nn.Module:
    return shared_model(family)


def pictures(family: TinyFamily) -> list:
    return [picture(0, family.size), picture(1, family.other_size), picture(2, family.other_size)]


def clips(family: TinyFamily) -> list:
    return [clip(seed, family.size, family.frames) for seed in range(3)]


def batch(family: TinyFamily):
    """Rows with two images, with one and with none."""
    return family.inputs(BATCH, pictures(family))


def alone(family: TinyFamily) -> list:
    """The rows of `batch`, one by one."""
    images = pictures(family)
    two, one = family.inputs(BATCH[:1], images[:2]), family.inputs(BATCH[1:2], images[2:])
    return [two, one, family.processor().tokenizer(BATCH[2:], return_tensors="pt")]


def batch_of_clips(family: TinyFamily):
    """Rows with two videos and with one."""
    return family.inputs(CLIPS, videos=clips(family))


def generate(model, inputs, steps: int = 6, **options) -> torch.Tensor:
    """The words a model adds, (B, steps)."""
    return model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options)[:, -steps:]


def kept(length: int, ratio: float = 0.4) -> int:
    return vltok.tokens.keep_count(length, ratio, None)


@by_method
def test_one_image(family, eager, method):
    oracle.check_prefill_and_words(eager, family, family.inputs(["w1 w2 <image> w3"], pictures(family)[:1]), method)


@by_method
def test_a_padded_batch_of_two_images_one_and_none(family, eager, method):
    oracle.check_prefill_and_words(eager, family, batch(family), method)


@by_video
@by_method
def test_videos(family, eager, method):
    oracle.check_prefill_and_words(eager, family, batch_of_clips(family), method)


def check_rows(model, inputs, singles: list, method) -> None:
    """A row of a padded batch must be what it is alone: logits, picks and words."""
    with vltok.apply(model, method) as handle:
        together, words = model(**inputs).logits, generate(model, inputs)
        picks = handle.report(file=None).keep_indices
        for row, single in enumerate(singles):
            real = inputs["attention_mask"][row].bool()
            assert_close(together[row : row + 1, real], model(**single).logits)
            assert torch.equal(words[row : row + 1], generate(model, single))
            if picks[row]:
                own = handle.report(file=None).keep_indices[0]
                assert [each.tolist() for each in own] == [each.tolist() for each in picks[row]]


@by_method
def test_a_row_of_a_batch_equals_the_row_alone(family, model, method):
    check_rows(model, batch(family), alone(family), method)


def test_random_picks_depend_on_the_picture_alone(family, model):
    check_rows(model, batch(family), alone(family), vltok.RandomTokens(keep_ratio=0.4))


@by_video
def test_a_row_of_a_batch_of_videos_equals_the_row_alone(family, model):
    videos = clips(family)
    singles = [family.inputs([text], videos=own) for text, own in zip(CLIPS, (videos[:2], videos[2:]), strict=True)]
    for method in (STRIDE, vltok.RandomTokens(keep_ratio=0.4)):
        check_rows(model, batch_of_clips(family), singles, method)


def check_beams(eager, family: TinyFamily, inputs, beams: int) -> None:
    """Words with and without a cache must be those of the unpruned model that the dropped tokens are hidden from."""
    with vltok.apply(eager, STRIDE) as handle:
        words = generate(eager, inputs, num_beams=beams)
        assert torch.equal(words, generate(eager, inputs, num_beams=beams, use_cache=False))
        eager(**inputs)
        gone = oracle.dropped(handle.report(file=None), oracle.placeholders(eager, inputs))
    with oracle.hidden(oracle.decoder_of(eager, family), gone.repeat_interleave(beams, 0)):
        assert torch.equal(words, generate(eager, inputs, num_beams=beams, use_cache=False))


@pytest.mark.parametrize("beams", [1, 2])
def test_words_without_a_cache_and_beams(family, eager, beams):
    prompts, images = ["w4 <image> w5 w6", "<image> w7", "w1 w2"], pictures(family)[:2]
    check_beams(eager, family, family.inputs(prompts, images), beams)


def test_beams_over_several_images_of_a_row(family, eager):
    inputs = batch(family)
    copies = (
        eager.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=True,
            top_k=1,
            num_return_sequences=2,
            output_logits=True,
            return_dict_in_generate=True,
        )
        .logits[0]
        .unflatten(0, (-1, 2))
    )
    if torch.allclose(copies[:, 0], copies[:, 1], atol=1e-3):
        check_beams(eager, family, inputs, 2)
        return
    # The unpruned model gives copies of a prompt different images.
    with vltok.apply(eager, STRIDE), pytest.raises(UnsupportedInputError, match="mixes up the images"):
        generate(eager, inputs, num_beams=2)


def test_report_has_a_budget_for_every_picture(family, model):
    first, second = family.tokens
    with vltok.apply(model, STRIDE) as handle:
        model(**batch(family))
        report = handle.report(file=None)
    assert report.visual_tokens == [[first, second], [second], []]
    assert report.kept_tokens == [[kept(first), kept(second)], [kept(second)], []]


@by_video
def test_report_has_a_budget_for_every_video(family, model):
    length = family.clip_tokens
    with vltok.apply(model, STRIDE) as handle:
        model(**batch_of_clips(family))
        report = handle.report(file=None)
    assert report.visual_tokens == [[length, length], [length]]
    assert report.kept_tokens == [[kept(length)] * 2, [kept(length)]]


def test_handle_leaves_the_model_as_it_was(family):
    model, inputs = family.model(), batch(family)
    logits, words = model(**inputs).logits, generate(model, inputs)
    before, weights = fingerprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    handle = vltok.apply(model, METHODS[1])
    assert not torch.equal(model(**inputs).logits, logits)
    generate(model, inputs)
    handle.remove()
    assert fingerprint(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, logits) and torch.equal(generate(model, inputs), words)


def test_positions_counted_anew(family, model):
    method = vltok.StrideTokens(keep_ratio=0.4, positions="reindex")
    if family.axes > 1:
        with pytest.raises(ValueError, match="several axes"):
            vltok.apply(model, method)
        return
    inputs = family.inputs(["w1 w2 <image> w3 <image>"], pictures(family)[:2])
    with vltok.apply(model, method) as handle:
        logits = model(**inputs).logits[0]
        gone = oracle.dropped(handle.report(file=None), oracle.placeholders(model, inputs))
        answer = model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = logits_of_kept(model, family, inputs, gone, answer.sequences[:, -6:-1], counts_anew=True)
    prompt = int((~gone).sum())
    assert_close(logits[~gone[0]], expected[:prompt])
    assert_close(torch.cat(answer.logits), expected[prompt - 1 :])


def test_a_budget_for_every_tile(family, eager):
    inputs = batch(family)
    names = ("pixel_values", "high_res_pixel_values", "pixel_mask", "image_grid_thw")
    encode = eager.model.get_image_features
    entries = len(encode(**{name: inputs[name] for name in names if name in inputs}).pooler_output)
    method = vltok.StrideTokens(num_keep=3, per="tile")
    oracle.check_prefill_and_words(eager, family, inputs, method)
    with vltok.apply(eager, method) as handle:
        eager(**inputs)
        kept_tokens = handle.report(file=None).kept_tokens
    assert [len(row) for row in kept_tokens] == [2, 1, 0]
    assert sum(map(sum, kept_tokens)) == 3 * entries


@by_video
def test_a_budget_for_every_frame(family, eager):
    inputs = batch_of_clips(family)
    frames = int(inputs["video_grid_thw"][0, 0])
    method = vltok.StrideTokens(num_keep=3, per="frame")
    oracle.check_prefill_and_words(eager, family, inputs, method)
    with vltok.apply(eager, method) as handle:
        eager(**inputs)
        report = handle.report(file=None)
    assert report.kept_tokens == [[3 * frames] * 2, [3 * frames]]
    length = family.clip_tokens // frames
    assert all(
        int((picks // length == frame).sum()) == 3 for picks in report.keep_indices[0] for frame in range(frames)
    )
