"""The families of `zoo.glm` and `zoo.late`: pruned models against oracles that know nothing of the engine."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
import torch
from calls import fingerprint
from reference import assert_close
from tiny import TinyFamily, clip, picture, shared_model
from zoo import glm, late, short

import vltok
from vltok.errors import UnsupportedInputError, UnsupportedModelError

ROWS = [*glm.ROWS, *late.ROWS]
METHODS = [vltok.StrideTokens(keep_ratio=0.4), vltok.ToDRE(keep_ratio=0.4, relevance=False)]
STRIDE = METHODS[0]
BATCH = ["w4 <image> w5 w6 <image> w7", "w1 w2 <image> w3", "w3 w4"]
CLIPS = ["w1 <video> w2 w3 <video> w4", "w5 <video> w6"]

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")

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


def check(eager, family: TinyFamily, inputs, method) -> None:
    """Compare a pruned model with the oracle that knows of the layers that hold a state, if it has some."""
    if oracle.is_recurrent(oracle.decoder_of(eager, family)):
        # Linear attention goes chunk by chunk: it rounds by where a token stands. Unpruned, too, a row differs by 1e-5.
        short.check_prefill_and_words(eager, family, inputs, method, tolerance=5e-5)
    else:
        oracle.check_prefill_and_words(eager, family, inputs, method)


@by_method
def test_one_image(family, eager, method):
    check(eager, family, family.inputs(["w1 w2 <image> w3"], pictures(family)[:1]), method)


@by_method
def test_a_padded_batch_of_two_images_one_and_none(family, eager, method):
    check(eager, family, batch(family), method)


@by_video
@by_method
def test_videos(family, eager, method):
    check(eager, family, batch_of_clips(family), method)


@pytest.mark.parametrize("family", [row for row in ROWS if row.video and row.mixes], ids=lambda family: family.key)
@by_method
def test_images_and_videos_in_one_prompt(family, eager, method):
    prompts = ["w1 <image> w2 <video> w3 <image> w4", "w5 <video> w6", "w7 <image>"]
    check(eager, family, family.inputs(prompts, pictures(family), videos=clips(family)[:2]), method)


def check_rows(model, inputs, singles: list, method) -> None:
    """A row of a padded batch must be what it is alone: logits, picks and words."""
    plain = model(**inputs).logits
    for row, single in enumerate(singles):
        real = inputs["attention_mask"][row].bool()
        if not torch.allclose(plain[row, real], model(**single).logits[0], atol=1e-3):
            pytest.skip("the unpruned model says something else of a row in a batch")
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
    if oracle.is_recurrent(oracle.decoder_of(eager, family)):  # these can't be told to forget
        return
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


def test_positions_counted_anew(family, eager):
    method = vltok.StrideTokens(keep_ratio=0.4, positions="reindex")
    if family.axes > 1:
        with pytest.raises(ValueError, match="several axes"):
            vltok.apply(eager, method)
    else:
        short.check_prefill_and_words(eager, family, batch(family), method)


def test_visual_tokens_that_are_dropped_inside_the_decoder(family, eager):
    decoder = oracle.decoder_of(eager, family)
    if oracle.is_recurrent(decoder):
        pytest.skip("some layers can't be told to forget")
    inputs, method = batch(family), vltok.ToDRE(keep_ratio=0.4, tau=1.0, depth=0.75)
    visual = oracle.placeholders(eager, inputs)
    if family.shares_keys:
        with pytest.raises(UnsupportedModelError, match="would still be seen there"):
            vltok.apply(eager, method)
        return
    with vltok.apply(eager, method) as handle:
        logits, words = eager(**inputs).logits, generate(eager, inputs)
        gone = oracle.dropped(handle.report(file=None), visual)
    last = SimpleNamespace(layers=decoder.layers[-1:])
    with oracle.hidden(decoder, gone), oracle.hidden(last, visual):
        expected = eager(**oracle.longer(inputs, words[:, :-1]), use_cache=False).logits
    seen, length = inputs["attention_mask"].bool() & ~visual, visual.shape[1]
    assert_close(logits[seen], expected[:, :length][seen])
    chosen = expected[:, length - 1 :].clone()
    chosen[..., [*eager.generation_config.suppress_tokens, 2]] = -torch.inf
    assert torch.equal(words, chosen.argmax(-1))


def test_a_budget_for_every_tile(family, eager):
    inputs = batch(family)
    given = {name: value for name, value in inputs.items() if name not in TEXT}
    tiles = len(eager.model.get_image_features(**given).pooler_output)
    if "pixel_attention_mask" in inputs:  # all tiles of a row are encoded together
        tiles = int(inputs["pixel_attention_mask"].sum())
    method = vltok.StrideTokens(num_keep=3, per="tile")
    check(eager, family, inputs, method)
    with vltok.apply(eager, method) as handle:
        eager(**inputs)
        kept_tokens = handle.report(file=None).kept_tokens
    assert [len(row) for row in kept_tokens] == [2, 1, 0]
    assert sum(map(sum, kept_tokens)) == 3 * tiles


@by_video
def test_a_budget_for_every_frame(family, eager):
    inputs = batch_of_clips(family)
    frames = int(inputs["video_grid_thw"][0, 0]) if "video_grid_thw" in inputs else family.frames
    method = vltok.StrideTokens(num_keep=3, per="frame")
    check(eager, family, inputs, method)
    with vltok.apply(eager, method) as handle:
        eager(**inputs)
        report = handle.report(file=None)
    assert report.kept_tokens == [[3 * frames] * 2, [3 * frames]]
    length = family.clip_tokens // frames
    assert all(
        int((picks // length == frame).sum()) == 3 for picks in report.keep_indices[0] for frame in range(frames)
    )
