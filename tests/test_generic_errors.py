"""Bad input for families that are lines of a table: what the model refuses is refused alike, and leaves nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import assert_close
from tiny import LLAVA, TinyFamily, clip, marks, picture, shared_model
from torch import nn
from unchanged import unchanged
from zoo.gemma import GEMMA3_ROW, GEMMA4_ROW, IDEFICS2, IDEFICS3, LIGHTON_OCR, MISTRAL3, PALIGEMMA
from zoo.glm import ARIA, GLM4V, GOT_OCR2
from zoo.qwen import QWEN3_5, QWEN3_VL
from zoo.tiles import ROWS as TILES

import vltok
from vltok.errors import UnsupportedInputError, UnsupportedModelError

BY_NAME = {row.name: row for row in TILES}
FAMILIES = [QWEN3_VL, QWEN3_5, GLM4V, GEMMA3_ROW, PALIGEMMA, IDEFICS3, MISTRAL3]
FAMILIES += [BY_NAME[name] for name in ("aya_vision", "lfm2_vl", "llava_next_video", "video_llava", "qianfan_ocr")]
STRIDE = vltok.StrideTokens(num_keep=3)
OF_PROMPTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")
Bad = Callable[[TinyFamily], dict[str, Any]]


def by_key(families: list[TinyFamily]) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.key)


@functools.lru_cache
def asked(family: TinyFamily, images: int) -> dict[str, Any]:
    """A prompt with so many images."""
    pictures = [picture(number, family.size) for number in range(images)]
    return dict(family.inputs([f"w1 {'<image> w2 ' * images}w3"], pictures))


def with_images_of(prompt: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A prompt with the images of another one."""
    own = {name: value for name, value in prompt.items() if name in OF_PROMPTS}
    return own | {name: value for name, value in other.items() if name not in OF_PROMPTS}


def one_placeholder_less(family: TinyFamily) -> dict[str, Any]:
    inputs = {name: value.clone() for name, value in asked(family, 1).items()}
    ids = list(marks(shared_model(family)).values())
    place = torch.isin(inputs["input_ids"][0], torch.tensor(ids)).nonzero()[0]
    inputs["input_ids"][0, place] = 10
    for name in inputs.keys() & {"mm_token_type_ids", "token_type_ids"}:
        inputs[name][0, place] = 0
    return inputs


def video_as_image(family: TinyFamily) -> dict[str, Any]:
    inputs = family.inputs(["w1 <video> w2"], videos=[clip(0, family.size, family.frames)])
    renamed = {"pixel_values_videos": "pixel_values", "video_grid_thw": "image_grid_thw"}
    return with_images_of(asked(family, 1), {renamed.get(name, name): value for name, value in inputs.items()})


BAD: dict[str, Bad] = {
    "an image too many": lambda family: with_images_of(asked(family, 1), asked(family, 2)),
    "an image too few": lambda family: with_images_of(asked(family, 2), asked(family, 1)),
    "a placeholder less": one_placeholder_less,
    "a video for an image": video_as_image,
    "another processor": lambda family: dict(LLAVA.inputs(["w1 <image><image> w2"], [picture(0), picture(1)])),
}
PAIRS = [
    pytest.param(family, bad, id=f"{family.key}-{name}")
    for family in FAMILIES
    for name, bad in BAD.items()
    if bad is not video_as_image or family.video
]


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Fail if the block changes a model, but for what some of transformers' note of their last call."""
    noted = vars(model.model).get("rope_deltas")
    with unchanged(model):
        yield
        if "rope_deltas" in vars(model.model):
            model.model.rope_deltas = noted


def error_of(model: nn.Module, inputs: dict[str, Any]) -> tuple[type, str] | None:
    try:
        model(**inputs)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(("family", "bad"), PAIRS)
def test_what_the_model_refuses_is_refused_alike_and_the_next_call_is_right(family, bad):
    model, good, inputs = shared_model(family), asked(family, 1), bad(family)
    plain = model(**good).logits
    told = error_of(model, inputs)
    with as_before(model), vltok.apply(model, STRIDE) as handle:
        expected = model(**good).logits
        kept = handle.report(file=None).kept_tokens
        if told is None:  # some processors write what other families read, too
            model(**inputs)
        else:
            assert error_of(model, inputs) == told
        assert torch.equal(model(**good).logits, expected)
        assert handle.report(file=None).kept_tokens == kept
        handle.remove()
        assert torch.equal(model(**good).logits, plain)


def test_most_bad_input_is_refused():
    refused = [error_of(shared_model(pair.values[0]), pair.values[1](pair.values[0])) is not None for pair in PAIRS]
    assert sum(refused) >= len(PAIRS) - 4


@by_key([MISTRAL3, LIGHTON_OCR, GEMMA4_ROW])
def test_images_in_another_order_than_the_prompts_are_refused(family):
    """transformers counts the tokens of all prompts together, and merges them as they come."""
    model = shared_model(family)
    sizes = [family.size, family.other_size]
    inputs = dict(family.inputs(["w1 <image> w2", "<image> w3"], [picture(0, sizes[0]), picture(1, sizes[1])]))
    turned = dict(family.inputs(["<image> w3", "w1 <image> w2"], [picture(1, sizes[1]), picture(0, sizes[0])]))
    first, second = family.tokens
    message = (
        rf"\[{first}, {second}\] image placeholders.* don't fit .* of \[{second}, {first}\] tokens; pass the images"
    )
    with as_before(model), vltok.apply(model, STRIDE) as handle:
        expected = model(**inputs).logits
        with pytest.raises(UnsupportedInputError, match=message):
            model(**with_images_of(inputs, turned))
        assert_close(model(**inputs).logits, expected)
        assert handle.report(file=None).kept_tokens == [[3], [3]]


@by_key([IDEFICS2, GOT_OCR2, ARIA])
@pytest.mark.parametrize("method", [vltok.FasterVLM(num_keep=3), vltok.ToDRE(keep_ratio=0.5, pivot="cls")])
def test_ranking_by_attention_is_refused_with_the_way_out(family, method):
    model = shared_model(family)
    with (
        unchanged(model),
        pytest.raises(UnsupportedModelError, match="choose a method that needs none, such as DivPrune"),
    ):
        vltok.apply(model, method)


@by_key([QWEN3_VL, GLM4V])
@pytest.mark.parametrize("method", [vltok.TokenPacker(scale_factor=2), vltok.SOFT(ratio=2), vltok.TAP(), vltok.ADL()])
def test_methods_that_change_a_projector_or_tower_are_refused_with_the_families_that_can(family, method):
    model, processor = shared_model(family), family.processor()
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"that can: llava|those that are: clip"):
        vltok.apply(model, method, processor=processor)
