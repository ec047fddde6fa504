"""Images come as pixels of any kind, encoded before, or merged into the embeddings: the answer is the same."""

from __future__ import annotations

import inspect

import pytest
import torch
from calls import generate, logits, pixels, positions, promise, prompt, same_picks, single
from oracle import placeholders
from prompts import CACHE_WORDS, TOKENS
from reference import assert_close
from rows import few
from tiny import picture
from versions import takes_encoded_images

import vltok


def encode(model: torch.nn.Module, inputs: dict):
    """What the model's own encoder returns for the images of a prompt."""
    known = inspect.signature(model.model.get_image_features).parameters
    given = {name.replace("_values_images", "_values"): value for name, value in inputs.items() if name not in TOKENS}
    with torch.no_grad():
        return model.model.get_image_features(
            **{name: value for name, value in given.items() if name in known}, return_dict=True
        )


def without_pixels(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name in TOKENS or name.endswith("grid_thw")}


@few
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16], ids=str)
def test_pixels_of_another_type_count_as_the_same_values(pair, model, dtype):
    inputs = dict(single(pair, 1))
    values = {name: (value * 50).clamp(0, 255).to(torch.uint8) for name, value in pixels(inputs).items()}
    given = inputs | {name: value.to(dtype) for name, value in values.items()}
    unpruned = dict(single(pair.unpruned, 1))
    try:
        given_unpruned = {name: (value * 50).clamp(0, 255).to(torch.uint8) for name, value in pixels(unpruned).items()}
        generate(model, unpruned | {name: value.to(dtype) for name, value in given_unpruned.items()})
    except (RuntimeError, ValueError):
        pytest.skip("the unpruned model doesn't take them")
    with pair.apply(model) as handle:
        expected = logits(model, inputs | {name: value.float() for name, value in values.items()})
        kept = handle.report(file=None)
        got = logits(model, given)
        report = handle.report(file=None)
        assert report.kept_tokens == kept.kept_tokens
        # Random picks may be drawn by the bits of the pixels.
        if same_picks(report.keep_indices, kept.keep_indices):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert generate(model, given).shape == (1, 5)


@takes_encoded_images
def test_images_encoded_once_serve_several_prompts(pair, model):
    texts = ["w1 w2 <image> w3 w4", "w1 w2 <image> w3 w4 w9 w8 w7 w6", "<image> w5"]
    with pair.apply(model) as handle:
        encoded = {"image": encode(model, prompt(pair, texts[0]))}
        for text in [*texts, texts[0]]:
            inputs = prompt(pair, text)
            expected = logits(model, inputs)
            right = handle.report(file=None)
            got = logits(model, {**without_pixels(inputs), "mm_encoder_outputs": encoded})
            assert_close(got, expected)
            assert same_picks(handle.report(file=None).keep_indices, right.keep_indices)
            assert handle.report(file=None).relevance == right.relevance


@takes_encoded_images
def test_images_encoded_before_others_keep_their_own_picks(pair, model):
    """Between encoding and call the model encodes other pictures; or the caller hands out encodings of its own."""
    inputs, other = prompt(pair, "w1 <image> w2", (1,)), prompt(pair, "w1 <image> w2", (0,))
    with pair.apply(model) as handle:
        expected = logits(model, inputs)
        right = handle.report(file=None).keep_indices
        encoded = encode(model, inputs)
        logits(model, other)
        got = logits(model, {**without_pixels(inputs), "mm_encoder_outputs": {"image": encoded}})
        assert same_picks(handle.report(file=None).keep_indices, right)
        assert_close(got, expected)
        logits(model, other)
        usual = vars(model.model).get("get_image_features")
        model.model.get_image_features = lambda *args, **options: encoded
        try:
            got = logits(model, inputs)
            picks = handle.report(file=None).keep_indices
        except vltok.errors.UnsupportedInputError:
            return
        finally:
            del model.model.get_image_features
            if usual is not None:
                model.model.get_image_features = usual
    assert same_picks(picks, right)
    assert_close(got, expected)


@takes_encoded_images
def test_encodings_from_before_the_method_are_used_rightly_or_refused(pair, model):
    inputs = prompt(pair, "w1 <image> w2", (1,))
    encoded = {"image": encode(model, pair.family.inputs(["w1 <image> w2"], [picture(1, pair.family.size)]))}
    with pair.apply(model):
        expected = logits(model, inputs)
        try:
            got = logits(model, {**without_pixels(inputs), "mm_encoder_outputs": encoded})
        except (vltok.errors.UnsupportedInputError, ValueError):
            return
        if pair.prunes:
            assert_close(got, expected)


def merged(pair, model, inputs: dict) -> dict:
    """The inputs with the pictures merged into the embeddings."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    features = encode(model, inputs).pooler_output
    embeds[placeholders(model, inputs)] = torch.cat([each.reshape(-1, embeds.shape[-1]) for each in features])
    at = positions(model, inputs).view(*pair.axes, 1, -1)
    others = {name: inputs[name] for name in TOKENS[1:] if name in inputs}
    return {"inputs_embeds": embeds, "position_ids": at, **others}


def test_images_merged_into_the_embeddings_are_pruned_alike(pair, model):
    promise("merged embeddings", embeddings_are_pruned_alike, pair, model)


def embeddings_are_pruned_alike(pair, model):
    inputs = dict(single(pair, 1))
    if not pair.axes:
        inputs["position_ids"] = positions(model, inputs)
    with pair.apply(model) as handle, torch.no_grad():
        expected = logits(model, inputs)
        right = handle.report(file=None) if pair.prunes else None
        logits(model, single(pair, 0))
        assert_close(logits(model, merged(pair, model, inputs)), expected)
        assert not pair.prunes or handle.report(file=None).kept_tokens == right.kept_tokens


def test_words_follow_images_merged_into_the_embeddings(pair, model):
    if pair.axes:
        pytest.skip("positions on several axes come from the words")
    unable = pair.family.unable
    if "merged embeddings" in unable and "words behind embeddings" not in unable:  # its words may be right by chance
        pytest.skip("the unpruned model can't: merged embeddings")
    promise("words behind embeddings", words_follow_embeddings, pair, model)


def words_follow_embeddings(pair, model):
    inputs = single(pair, 1)
    with pair.apply(model), torch.no_grad():
        given = merged(pair, model, inputs)
        given.pop("position_ids")
        assert torch.equal(generate(model, given), generate(model, inputs))


@pytest.mark.parametrize("word", CACHE_WORDS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_output_is_a_tuple_on_request(pair, model, word):
    inputs = single(pair, 1)
    with pair.apply(model), torch.no_grad():
        expected = model(**inputs)
        first, cache, *_ = model(**inputs, return_dict=False, use_cache=True)
        assert torch.equal(first, expected.logits)
        at = positions(model, inputs).reshape(-1).max() + 1
        step = {"input_ids": torch.tensor([[9]]), "position_ids": at.expand(*pair.axes, 1, 1)}
        again = model(**step, **{word: cache}, return_dict=False)[0]
        assert again.shape == (1, 1, expected.logits.shape[-1])
