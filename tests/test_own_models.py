"""Models of one's own: subclasses, code that lies beside the weights, and models that nobody told vltok of."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remote
import torch
import transformers
from oracle import dropped, hidden, longer, placeholders
from peft import LoraConfig, get_peft_model
from prompts import batch, single
from reference import assert_close
from tiny import LLAVA, QWEN2_5_VL, TinyFamily
from torch import nn
from transformers import LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from unchanged import unchanged
from zoo.gemma import GEMMA3_ROW

import vltok
from vltok.errors import CheckpointError, UnsupportedInputError, UnsupportedModelError
from vltok.families.vlm import VLMS

STRIDE = vltok.StrideTokens(num_keep=5)
GENERIC = {"family": "generic", "image_token_id": 4}
MARK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Weights with code beside them."""
    base = tmp_path_factory.mktemp("remote")
    with remote.saved(base / "weights", base / "modules") as folder:
        yield folder


@pytest.fixture
def model(folder) -> nn.Module:
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager"
    )
    assert type(loaded).__module__.startswith("transformers_modules.")
    return loaded


@pytest.fixture
def registered(model) -> Iterator[type]:
    """The class of the model, registered with one call."""
    cls = type(model.model)
    vltok.register_family("vlm", "remote", cls, image_token_id=MARK)
    yield cls
    del VLMS["remote"]


def prompts(images: int = 1, tokens: int = 16, between: int = 0, rows: int = 1) -> dict[str, torch.Tensor]:
    """Prompts of words and images, which begin with padding but for the last row."""
    row = [1, 10, *([MARK] * tokens + [20] * between) * images, 11, 12]
    ids = torch.tensor([[0] * (rows - number - 1) + row + [13] * number for number in range(rows)])
    pixels = torch.randn(images * rows, 3, 56, 56, generator=torch.Generator().manual_seed(images))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def check(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int = 4, **options: Any) -> None:
    """Compare a pruned model with the unpruned one that the dropped tokens are hidden from, prefill and words."""
    visual, answer = inputs["input_ids"] == MARK, {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with vltok.apply(model, STRIDE, **options) as handle:
        actual = model(**inputs).logits
        gone = dropped(handle.report(file=None), visual)
        said = model.generate(**inputs, **answer, output_logits=True, return_dict_in_generate=True)
    assert gone.sum() == visual.sum() - STRIDE.num_keep * len(inputs["pixel_values"])
    words, plain = said.sequences[:, -steps:], model(**inputs).logits
    with hidden(decoder(model), gone):
        expected = model(**longer(inputs, words[:, :-1]), use_cache=False).logits
    seen, length = inputs["attention_mask"].bool() & ~gone, visual.shape[1]
    assert_close(actual[seen], expected[:, :length][seen])
    assert_close(torch.stack(said.logits, 1), expected[:, length - 1 :])
    assert not torch.allclose(plain[:, -1], expected[:, length - 1], atol=1e-3), "pruning should matter"


def decoder(model: nn.Module) -> nn.Module:
    return next(part for name, part in model.named_modules() if name.endswith("language_model"))


# A subclass of a supported model is found by its bases


class Dimmed(LlavaModel):
    """A LLaVA that somebody changed."""

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        output = super().get_image_features(pixel_values, **kwargs)
        output.pooler_output = [0.5 * entry for entry in output.pooler_output]
        return output


def test_a_subclass_of_a_supported_model_needs_no_registration():
    model, inputs = LLAVA.model("eager"), batch(LLAVA)
    plain = vltok.apply(model, STRIDE)
    before = model(**inputs).logits
    plain.remove()
    model.model.__class__ = Dimmed
    with vltok.apply(model, STRIDE) as handle:
        assert handle.family == "llava" and not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    check(model, {**inputs})


# Code beside the weights


def test_code_beside_the_weights_is_refused_until_it_is_registered(model):
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r'register_family\(\), and family="generic"'):
        vltok.apply(model, STRIDE)


@pytest.mark.parametrize(("images", "rows"), [(1, 1), (2, 1), (1, 3)])
def test_a_registered_model_computes_what_it_would_without_the_tokens(model, registered, images, rows):
    check(model, prompts(images, rows=rows))
    with vltok.apply(model, STRIDE) as handle:
        assert handle.family == "remote" and handle.host is model.model
    assert vltok.supported_models()["vlm"]["remote"].model_classes == (registered.__name__,)


def test_a_registered_model_is_saved_and_loaded_by_its_name(model, registered, tmp_path):
    inputs = prompts()
    with vltok.apply(model, [STRIDE, vltok.SOFT(ratio=2)]) as handle:
        expected = model(**inputs).logits
        vltok.save(handle, tmp_path)
    assert json.loads((tmp_path / "vltok_config.json").read_text())["family"] == "remote"
    with unchanged(model), vltok.load(model, tmp_path):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("facts", "between", "pictures"),
    [
        ({}, 0, [[16, 16]]),
        ({"unit": "run"}, 0, [[32]]),
        ({"unit": "run"}, 1, [[16, 16]]),
        ({"unit": "run", "gap": 1}, 1, [[32]]),
        ({"unit": "run", "gap": 1}, 2, [[16, 16]]),
    ],
)
def test_what_an_image_is_can_be_said_at_registration(model, facts, between, pictures):
    vltok.register_family("vlm", "remote", type(model.model), image_token_id=MARK, **facts)
    try:
        with vltok.apply(model, STRIDE) as handle:
            model(**prompts(2, between=between))
            report = handle.report(file=None)
    finally:
        del VLMS["remote"]
    assert report.visual_tokens == pictures
    assert report.kept_tokens == [[5] * len(pictures[0])]


def test_a_registered_head_is_pointed_out(model):
    head = type(model)
    head.get_image_features = lambda self, pixel_values: self.model.get_image_features(pixel_values)
    vltok.register_family("vlm", "remote", head, image_token_id=MARK)
    try:
        with unchanged(model), pytest.raises(UnsupportedModelError, match="register the class of this part"):
            vltok.apply(model, STRIDE)
    finally:
        del VLMS["remote"], head.get_image_features


@pytest.mark.parametrize(
    ("arguments", "facts", "error", "message"),
    [
        (
            ("vlm", "mine", LlavaModel),
            {"unit": "page"},
            ValueError,
            "unit must be one of 'entry', 'run', 'row', got 'page'",
        ),
        (("vlm", "mine", LlavaModel), {"gap": -1}, ValueError, "gap must be at least 0, got -1"),
        (("vlm", "mine", LlavaModel), {"gap": "1"}, TypeError, "gap must be an integer of at least 0, got '1'"),
        (("vlm", "mine", LlavaModel), {"image_token_id": 1.0}, TypeError, "image_token_id must be an integer"),
        (("vlm", "mine", LlavaModel), {"video_token_id": -4}, ValueError, "video_token_id must be at least 0, got -4"),
        (("vlm", "mine", "my.code"), {}, ValueError, "pass the class of a vision-language model"),
        (("tower", "mine", LlavaModel), {}, ValueError, "pass the class of a vision-language model"),
        (("vlm", "mine", "my.code", "my.family"), {}, ValueError, "by a module and a class in it, or by facts"),
        (("vlm", "mine", "my.code", "my.family", "Mine"), {"gap": 1}, ValueError, "or by facts such as unit"),
        (("vlm", "generic", LlavaModel), {}, ValueError, "'generic' is already registered"),
    ],
)
def test_a_registration_that_says_too_little_or_too_much_is_refused(arguments, facts, error, message):
    known = dict(VLMS)
    with pytest.raises(error, match=message):
        vltok.register_family(*arguments, **facts)
    assert known == VLMS


# family="generic"


class Around(nn.Module):
    """A wrapper that knows nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(("images", "rows"), [(1, 1), (2, 1), (1, 3)])
def test_a_model_nobody_told_of_computes_what_it_would_without_the_tokens(model, images, rows):
    check(model, prompts(images, rows=rows), **GENERIC)


@pytest.mark.parametrize("wrap", ["head", "bare", "around", "peft"])
def test_it_is_found_with_its_head_bare_and_inside_wrappers(model, wrap):
    inputs = prompts()
    with vltok.apply(model, STRIDE, **GENERIC):
        expected = model.model(**inputs).last_hidden_state
    adapted = LoraConfig(target_modules=["q_proj"], init_lora_weights=True)  # begins as it was
    wrapped = {"head": lambda: model, "bare": lambda: model.model, "around": lambda: Around(model)}
    outer = wrapped.get(wrap, lambda: get_peft_model(model, adapted))()
    inner = model.model
    with vltok.apply(outer, STRIDE, **GENERIC) as handle:
        assert handle.host is inner and handle.family == "generic"
        outer(**inputs)
        assert handle.report(file=None).kept_tokens == [[5]]
        assert torch.equal(inner(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("family", [LLAVA, QWEN2_5_VL, GEMMA3_ROW], ids=lambda family: family.key)
def test_known_models_are_pruned_alike_by_their_family_and_as_generic_ones(family: TinyFamily):
    model, inputs = family.model("eager"), single(family, "two images")
    with vltok.apply(model, STRIDE):
        expected = model(**inputs).logits
    with vltok.apply(model, STRIDE, family="generic") as handle:
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.report(file=None).visual_tokens == [[family.tokens[1], family.tokens[0]]]
    assert placeholders(model, inputs).any() and not torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("how", ["tensor", "rows", "list", "tuple", "output"])
def test_features_may_come_in_any_of_the_usual_forms(model, how):
    inputs, own, cls = prompts(), type(model.model).get_image_features, type(model.model)
    with vltok.apply(model, STRIDE, **GENERIC):
        expected = model(**inputs).logits
    forms = {
        "tensor": lambda features: features,
        "rows": lambda features: features.flatten(0, 1),
        "list": list,
        "tuple": tuple,
        "output": lambda features: BaseModelOutputWithPooling(pooler_output=features),
    }
    forward = cls.forward

    def merge(
        self: nn.Module, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ):
        features = self.get_image_features(pixel_values)
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, torch.Tensor) else torch.stack(list(features))
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == MARK)[..., None].expand_as(embeds), features)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    try:
        cls.get_image_features = lambda self, pixel_values: forms[how](own(self, pixel_values))
        cls.forward = merge
        with vltok.apply(model, STRIDE, **GENERIC) as handle:
            assert torch.equal(model(**inputs).logits, expected)
            assert handle.report(file=None).kept_tokens == [[5]]
    finally:
        cls.get_image_features, cls.forward = own, forward


def test_two_models_side_by_side_are_refused(model):
    pair = Around(model)
    pair.second = LLAVA.model()
    with unchanged(pair), pytest.raises(UnsupportedModelError, match=r"Around holds 2 generic models side by side"):
        vltok.apply(pair, STRIDE, **GENERIC)


def test_an_id_must_be_known(model):
    with unchanged(model), pytest.raises(UnsupportedModelError, match="names no image_token_id; say which id"):
        vltok.apply(model, STRIDE, family="generic")
    for given, error in (("4", TypeError), (True, TypeError), (-1, ValueError)):
        with unchanged(model), pytest.raises(error, match="image_token_id must be"):
            vltok.apply(model, STRIDE, family="generic", image_token_id=given)
    with unchanged(model), pytest.raises(ValueError, match=r'family must be "generic" or left out.*need it'):
        vltok.apply(model, STRIDE, image_token_id=4)
    with unchanged(model), pytest.raises(ValueError, match=r"got family='llava'"):
        vltok.apply(model, STRIDE, family="llava")


@pytest.mark.parametrize(("wrong", "count"), [(63, "no placeholders"), (11, r"\[1\] image placeholders")])
def test_a_wrong_id_is_told_at_the_first_call(model, wrong, count):
    inputs = prompts()
    expected = model(**inputs).logits
    message = rf"{count}, which don't fit .* of \[16\] tokens"
    with unchanged(model):
        with (
            vltok.apply(model, STRIDE, family="generic", image_token_id=wrong),
            pytest.raises(UnsupportedInputError, match=message),
        ):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, expected)


class Bare(nn.Module):
    """What lacks something."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.language_model, self.vision = model.config, model.language_model, model.vision_model

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision(pixel_values).last_hidden_state

    def forward(self, input_ids: torch.Tensor, pixel_values: Any = None, **kwargs: Any) -> Any:
        return self.language_model(input_ids, **kwargs)


class NoDecoder(Bare):
    """One whose decoder goes by another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.brain = self.language_model
        del self.language_model


class NoEncoder(nn.Module):
    """One that encodes images by another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.language_model = model.config, model.language_model


class Closed(Bare):
    """One that takes no other keywords."""

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> Any:
        return self.language_model(inputs_embeds=self.get_image_features(pixel_values))


class Renamed(Bare):
    """One that calls images otherwise."""

    def forward(self, input_ids: torch.Tensor, images: Any = None, **kwargs: Any) -> Any:
        return self.language_model(input_ids, **kwargs)


class EncodesRenamed(Bare):
    """One whose encoder does."""

    def get_image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision(images).last_hidden_state


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Renamed, r"Renamed.forward\(\) has no parameter pixel_values"),
        (EncodesRenamed, r"EncodesRenamed.get_image_features\(\) has no parameter pixel_values"),
        (NoDecoder, "both get_image_features.* and a decoder with `layers`"),
        (NoEncoder, "both get_image_features.* and a decoder with `layers`"),
        (Closed, r"Closed.forward\(\) takes no \*\*kwargs"),
    ],
)
def test_a_model_that_lacks_a_part_is_refused(model, cls, message):
    other = cls(model.model)
    with unchanged(other), pytest.raises(UnsupportedModelError, match=message):
        vltok.apply(other, STRIDE, **GENERIC)


def test_a_tower_that_goes_by_another_name_is_told(model):
    other = Bare(model.model)
    with unchanged(other), pytest.raises(UnsupportedModelError, match="no vision tower that vltok can find"):
        vltok.apply(other, vltok.SOFT(ratio=2), **GENERIC)


def _more(self: nn.Module, pixel_values: torch.Tensor) -> Any:
    return self.connector(self.vision_model(pixel_values).last_hidden_state).repeat(
        1, 2, 1
    )  # the model takes the first


def _secret(self: nn.Module, pixel_values: torch.Tensor) -> Any:
    return Sealed(self.connector(self.vision_model(pixel_values).last_hidden_state))


class Sealed:
    """Features that can't be seen."""

    def __init__(self, features: torch.Tensor) -> None:
        self.to = lambda dtype: features


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (_more, r"\[16\] image placeholders, which don't fit the encoded images, of \[32\] tokens"),
        (_secret, "return features, .* or an output that has them as pooler_output"),
    ],
)
def test_features_that_do_not_agree_with_the_placeholders_are_told_at_the_first_call(model, encode, message):
    inputs, cls = prompts(), type(model.model)
    own, cls.get_image_features = cls.get_image_features, encode
    try:
        expected = model(**inputs).logits
        told = pytest.raises(UnsupportedInputError, match=message)
        with unchanged(model), vltok.apply(model, STRIDE, **GENERIC), told:
            model(**inputs)
        assert torch.equal(model(**inputs).logits, expected)
    finally:
        cls.get_image_features = own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda decoder, embeds, kwargs: decoder(None, inputs_embeds=embeds),
            "hands no keyword arguments to its language",
        ),
        (
            lambda decoder, embeds, kwargs: decoder(input_ids=embeds.argmax(-1), **kwargs),
            "without the keyword inputs_embeds",
        ),
    ],
)
def test_a_model_that_keeps_keywords_for_itself_is_told_at_the_first_call(model, call, message):
    cls, inputs = type(model.model), prompts()
    own = cls.forward

    def forward(
        self: nn.Module, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ):
        features = self.get_image_features(pixel_values)
        return call(self.language_model, features, {key: value for key, value in kwargs.items() if "return" not in key})

    cls.forward = forward
    try:
        told = pytest.raises(UnsupportedModelError, match=message)
        with unchanged(model), vltok.apply(model, STRIDE, **GENERIC), told:
            model(**inputs)
    finally:
        cls.forward = own


def test_a_decoder_that_keeps_keywords_from_its_layers_is_told_at_the_first_call(model):
    decoder, inputs = model.model.language_model, prompts()

    class Closed(type(decoder)):
        """A decoder whose layers would not learn of anything."""

        def forward(
            self, inputs_embeds: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
        ):
            tables = self.rotary_emb(inputs_embeds, position_ids)
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds, position_embeddings=tables, attention_mask=None)
            return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds)

    decoder.__class__ = Closed
    told = pytest.raises(UnsupportedModelError, match="hands no keyword arguments to its layers")
    with unchanged(model), vltok.apply(model, STRIDE, **GENERIC), told:
        model(**inputs)


# Saving


@pytest.mark.parametrize("methods", [[STRIDE], [STRIDE, vltok.SOFT(ratio=2)]], ids=["no weights", "weights"])
def test_what_was_saved_from_a_generic_model_is_loaded_onto_one(model, methods, tmp_path):
    inputs = prompts()
    with vltok.apply(model, methods, **GENERIC) as handle:
        expected = model(**inputs).logits
        vltok.save(handle, tmp_path)
    with unchanged(model), vltok.load(model, tmp_path) as handle:
        assert handle.family == "generic"
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.settings()["image_token_id"] == MARK and "video_token_id" not in handle.settings()


def test_a_whole_model_saved_while_it_was_generic_is_loaded_as_such(tmp_path):
    model, inputs = LLAVA.model(), batch(LLAVA)
    with vltok.apply(model, [STRIDE, vltok.SOFT(ratio=2)], **GENERIC):
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
    with vltok.from_pretrained(tmp_path) as handle:
        assert handle.family == "generic" and handle.settings()["image_token_id"] == MARK
        assert torch.equal(handle.model(**inputs).logits, expected)


def test_ids_in_a_saved_folder_are_checked(model, tmp_path):
    with vltok.apply(model, STRIDE, **GENERIC) as handle:
        vltok.save(handle, tmp_path)
    file = tmp_path / "vltok_config.json"
    saved = json.loads(file.read_text())
    for changes, message in (
        ({"image_token_id": "4"}, "image_token_id must be an integer of at least 0, got '4'"),
        ({"video_token_id": -1}, "video_token_id must be an integer of at least 0, got -1"),
        ({"family": "llava"}, "unknown fields image_token_id"),
        ({"family": "generic", "audio_token_id": 4}, "unknown fields audio_token_id"),
    ):
        file.write_text(json.dumps(saved | changes))
        with unchanged(model), pytest.raises(CheckpointError, match=message):
            vltok.load(model, tmp_path)


def test_a_generic_model_can_be_copied_with_its_handle(model):
    inputs = prompts()
    with vltok.apply(model, STRIDE, **GENERIC) as handle:
        expected = model(**inputs).logits
        copied = pickle.loads(pickle.dumps(handle))
        assert torch.equal(copied.model(**inputs).logits, expected)
        copied.remove()
        assert not torch.equal(copied.model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
