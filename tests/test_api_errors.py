"""Bad input: each gets an error that says what came and what to do, and the model stays as it was."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LLAVA, LLAVA_SIGLIP, TEXT, picture
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from unchanged import unchanged

import vltok
from vltok.errors import UnsupportedInputError, UnsupportedModelError

SELECTORS = [vltok.ToDRE, vltok.DivPrune, vltok.FasterVLM, vltok.RandomTokens, vltok.StrideTokens]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def inputs() -> Any:
    return LLAVA.inputs(["w1 <image> w2 w3"], [picture(0)])  # 16 visual tokens


@pytest.fixture(scope="module")
def model(inputs) -> nn.Module:
    model = LLAVA.model()
    model(**inputs)  # transformers hooks itself in at the first call
    return model


# Budgets


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({"keep_ratio": 0}, ValueError, r"\(0, 1\], got 0"),
        ({"keep_ratio": -0.1}, ValueError, r"\(0, 1\], got -0\.1"),
        ({"keep_ratio": 1.5}, ValueError, r"\(0, 1\], got 1\.5"),
        ({"keep_ratio": math.nan}, ValueError, r"\(0, 1\], got nan"),
        ({"keep_ratio": math.inf}, ValueError, r"\(0, 1\], got inf"),
        ({"keep_ratio": "x"}, TypeError, r"\(0, 1\], got 'x'"),
        ({"keep_ratio": "0.5"}, TypeError, r"\(0, 1\], got '0\.5'"),
        ({"keep_ratio": True}, TypeError, r"\(0, 1\], got True"),
        ({"num_keep": 0}, ValueError, "at least 1, got 0"),
        ({"num_keep": -3}, ValueError, "at least 1, got -3"),
        ({"num_keep": 2.0}, TypeError, r"integer of at least 1, got 2\.0"),
        ({"num_keep": True}, TypeError, "integer of at least 1, got True"),
        ({"keep_ratio": 0.5, "num_keep": 3}, ValueError, r"exactly one .* got keep_ratio=0\.5 and num_keep=3"),
        ({}, ValueError, "exactly one of keep_ratio and num_keep, got neither"),
    ],
    ids=repr,
)
def test_a_budget_out_of_range_is_refused_when_the_method_is_made(selector, budget, error, message):
    with pytest.raises(error, match=message):
        selector(**budget)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    ("budget", "count"),
    [({"keep_ratio": 1}, 16), ({"keep_ratio": 1e-9}, 1), ({"num_keep": 1}, 1), ({"num_keep": 16}, 16)],
    ids=repr,
)
def test_the_ends_of_the_range_are_allowed(selector, budget, count, model, inputs):
    with unchanged(model), vltok.apply(model, selector(**budget)) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.report(file=None).kept_tokens
    assert kept == [[count]]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_count_above_the_visual_tokens_of_the_image_keeps_them_all(selector, model, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits
        with unchanged(model), vltok.apply(model, selector(num_keep=17)) as handle:
            assert torch.equal(model(**inputs).logits, expected)
            assert handle.report(file=None).kept_tokens == [[16]]
            handle.remove()


def test_a_refused_call_leaves_a_model_that_answers_the_next_one(model, inputs):
    text = LLAVA.inputs(["w1 w2"])
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], math.nan)}
    with torch.no_grad():
        expected = model(**text).logits
        with vltok.apply(model, vltok.StrideTokens(num_keep=2)):
            with pytest.raises(UnsupportedInputError, match="NaN"):
                model(**broken)
            assert torch.equal(model(**text).logits, expected)


# Settings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vltok.ToDRE(0.5, strategy="max_min"), ValueError, "'max_sum', 'k_center', got 'max_min'"),
        (lambda: vltok.ToDRE(0.5, pivot=3), ValueError, "'random', got 3"),
        (lambda: vltok.ToDRE(0.5, depth=1), ValueError, r"in \(0, 1\), or several, got 1"),
        (lambda: vltok.ToDRE(0.5, depth=()), ValueError, r"or several, got \(\)"),
        (lambda: vltok.ToDRE(0.5, tau=1.5), ValueError, r"in 0\.\.1, got 1\.5"),
        (lambda: vltok.ToDRE(0.5, tau=math.nan), ValueError, r"in 0\.\.1, got nan"),
        (lambda: vltok.ToDRE(0.5, stages=(2, 1)), ValueError, r"\(1, 2\), got \(2, 1\)"),
        (lambda: vltok.ToDRE(0.5, relevance=None), TypeError, "True or False, got None"),
        (lambda: vltok.ToDRE(0.5, relevance=False, stages=(2,)), ValueError, "relevance=False leaves out stage 2"),
        (lambda: vltok.StrideTokens(0.5, positions="grid"), ValueError, "'keep', 'reindex', 'stretch', got 'grid'"),
        (lambda: vltok.FasterVLM(0.5, score="text"), ValueError, "'received', got 'text'"),
        (lambda: vltok.RandomTokens(0.5, seed=0.5), TypeError, r"integer, got 0\.5"),
    ],
)
def test_a_setting_out_of_range_is_refused_when_the_method_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


# What is not a model, not a method, or not a model with visual tokens


@pytest.mark.parametrize(
    ("thing", "name"), [("llava-hf/llava-1.5-7b-hf", "str"), (None, "NoneType"), (LlamaForCausalLM, "type")], ids=repr
)
def test_what_is_no_module_is_refused(thing, name):
    with pytest.raises(TypeError, match=rf"apply\(\) takes a model \(torch\.nn\.Module\), got {name}"):
        vltok.apply(thing, vltok.ToDRE(keep_ratio=0.5))


@pytest.mark.parametrize("thing", [0.1, None, {"keep_ratio": 0.1}, [0.1], ["stride,num_keep=2", None]], ids=repr)
def test_what_is_no_method_is_refused(model, thing):
    with (
        unchanged(model),
        pytest.raises(TypeError, match=r"apply\(\) takes methods such as vltok\.ToDRE\(keep_ratio=0\.1\)"),
    ):
        vltok.apply(model, thing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("todr,keep_ratio=0.5", "unknown method 'todr'; did you mean 'todre'"),
        ("FasterVLM,keep_ratio=0.5", "did you mean 'fastervlm'"),
        ("quux", "unknown method 'quux'; this vltok knows adl, "),
        ("todre,kep_ratio=0.5", "unknown field 'kep_ratio' of todre; did you mean 'keep_ratio'"),
        ("todre", "exactly one of keep_ratio and num_keep, got neither"),
        ("todre,keep_ratio=high", "'todre,keep_ratio=high': keep_ratio must be a number"),
        ("todre,keep_ratio", "written once, as key=value, got 'keep_ratio'"),
        ("todre,keep_ratio=0.1,keep_ratio=0.2", "got keep_ratio twice in"),
        ("", "unknown method ''"),
        ('{"method": ["todre"]}', "unknown method"),
    ],
)
def test_a_text_that_names_no_method_is_refused(model, text, message):
    for methods in (text, [vltok.SOFT(ratio=2), text]):
        with unchanged(model), pytest.raises(ValueError, match=message):
            vltok.apply(model, methods)


def test_a_class_in_the_place_of_an_instance_is_pointed_out(model):
    with unchanged(model), pytest.raises(TypeError, match="make an instance of it"):
        vltok.apply(model, vltok.ToDRE)
    with unchanged(model), pytest.raises(TypeError, match="make an instance of it"):
        vltok.apply(model, [vltok.StrideTokens(num_keep=2), vltok.ToDRE])


def test_no_method_at_all_is_refused(model):
    with unchanged(model), pytest.raises(ValueError, match="at least one method, got none"):
        vltok.apply(model, [])


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
        lambda: CLIPModel(
            CLIPConfig(vision_config=VISION | {"image_size": 28}, text_config=VISION | {"vocab_size": 16})
        ),
        lambda: CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=28)),
        lambda: nn.Linear(2, 2),
    ],
    ids=["text model", "CLIP", "vision tower", "plain module"],
)
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_model_without_visual_tokens_in_a_language_model_is_refused(make, selector):
    stranger = make()
    message = rf"{type(stranger).__name__} has no visual tokens .*`python -m vltok families` lists.*register_family\(\)"
    with unchanged(stranger), pytest.raises(UnsupportedModelError, match=message):
        vltok.apply(stranger, selector(keep_ratio=0.5))


class Pair(nn.Module):
    """A wrapper of two models that is nobody's head."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher


@pytest.mark.parametrize("method", [vltok.ToDRE(0.5), vltok.SOFT(ratio=2)])
@pytest.mark.parametrize("second", [LLAVA, LLAVA_SIGLIP])
def test_two_models_in_one_wrapper_are_refused(model, method, second):
    pair = Pair(model, second.model())
    message = r"Pair holds 2 vision-language models side by side: student \(Llava.*\), teacher \(Llava.*pass that one"
    with unchanged(pair), pytest.raises(UnsupportedModelError, match=message):
        vltok.apply(pair, method)


def test_two_towers_in_one_wrapper_are_refused():
    make = functools.partial(CLIPVisionModel, CLIPVisionConfig(**VISION, image_size=28, patch_size=7))
    pair = Pair(make(), make())
    message = r"Pair holds 2 vision towers side by side: student \(CLIPVisionModel\), teacher"
    with unchanged(pair), pytest.raises(UnsupportedModelError, match=message):
        vltok.apply(pair, vltok.SOFT(ratio=2))
    vltok.apply(pair.teacher, vltok.SOFT(ratio=2)).remove()


def test_one_model_under_two_names_is_one(model):
    with vltok.apply(Pair(model, model), vltok.StrideTokens(num_keep=2)) as handle:
        assert handle.host is model.model


def test_a_draft_model_that_hangs_on_the_head_is_no_second_model(model):
    model.draft = LLAVA.model()
    try:
        for method in (vltok.StrideTokens(num_keep=2), vltok.SOFT(ratio=2)):
            with unchanged(model.draft), vltok.apply(Pair(model, nn.Identity()), method) as handle:
                assert handle.host is model.model
    finally:
        del model.draft


@pytest.mark.parametrize("is_off", [False, True])
def test_of_the_copies_that_an_adapter_keeps_the_one_that_runs_is_changed(is_off):
    adapted = get_peft_model(LLAVA.model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_tower"]))
    copies = adapted.base_model.model.model.vision_tower
    if is_off:
        adapted.base_model.disable_adapter_layers()
    runs, rests = copies.modules_to_save["default"], copies.original_module
    if is_off:
        runs, rests = rests, runs
    with unchanged(rests), vltok.apply(adapted, vltok.SOFT(ratio=2)) as handle:
        assert handle.added_modules
        assert all(any(part is added for part in runs.modules()) for added in handle.added_modules)


def test_cls_attention_of_a_tower_without_cls_is_refused():
    siglip = LLAVA_SIGLIP.model()
    for method in (vltok.ToDRE(0.5, pivot="cls"), vltok.FasterVLM(0.5, score="cls")):
        with unchanged(siglip), pytest.raises(UnsupportedModelError, match=r"has no \[CLS\] token"):
            vltok.apply(siglip, method)


def test_two_selectors_are_refused_and_the_first_is_taken_off_again(model):
    with unchanged(model), pytest.raises(ValueError, match="StrideTokens already selects visual tokens"):
        vltok.apply(model, [vltok.StrideTokens(num_keep=2), vltok.ToDRE(keep_ratio=0.5)])


# Inputs that can't be answered rightly


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("selector", SELECTORS)
def test_visual_tokens_that_are_not_finite_are_refused(selector, bad, model, inputs):
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], bad)}
    with unchanged(model), vltok.apply(model, selector(keep_ratio=0.5)):
        with pytest.raises(UnsupportedInputError, match="visual tokens contain NaN or infinity"):
            model(**broken)
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()


def test_a_static_cache_is_refused(model, inputs):
    with (
        vltok.apply(model, vltok.StrideTokens(num_keep=2)),
        pytest.raises(UnsupportedInputError, match="use the default dynamic cache"),
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_an_attention_mask_that_hides_placeholders_is_refused(model, inputs):
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["input_ids"][0] == 4).nonzero()[0]] = 0
    with (
        vltok.apply(model, vltok.StrideTokens(num_keep=2)),
        pytest.raises(UnsupportedInputError, match="hides image placeholders"),
    ):
        model(**{**inputs, "attention_mask": mask})
