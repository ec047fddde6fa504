"""Presets let exactly the named parts train, in every family, and LoRA changes nothing at its start."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL

import vltok
from vltok.errors import UnsupportedModelError
from vltok.train import add_lora, set_trainable

PROJECTORS = ("model.multi_modal_projector.", "model.visual.merger.")
LLM = ("model.language_model.", "lm_head.", "model.image_newline")


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def under(model, *places: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(places)}


def apply(family, method=None):
    processor = family.processor()
    return vltok.apply(family.model(), method or vltok.StrideTokens(num_keep=4), processor=processor)


@pytest.mark.parametrize("family", tiny.PRUNABLE, ids=lambda family: f"{family.name}-{family.has_cls}")
def test_presets_name_the_parts_that_train_under_a_pruning_method(family):
    handle = apply(family)
    model = handle.model
    projector, llm = under(model, *PROJECTORS), under(model, *LLM)
    assert projector and llm
    counts = set_trainable(handle, "projector")
    assert trainable(model) == projector
    assert counts["projector"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    set_trainable(handle, "llm+projector")
    assert trainable(model) == projector | llm
    set_trainable(handle, "llm")
    assert trainable(model) == llm
    assert set_trainable(handle, "tower")["llm"] == 0
    assert trainable(model) == under(model, "model.vision_tower.", "model.visual.") - projector
    set_trainable(handle, "projector+llm+tower")
    assert trainable(model) == set(dict(model.named_parameters()))


@pytest.mark.parametrize(("family", "scale"), [(LLAVA, 2), (LLAVA_NEXT, 3), (LLAVA_ONEVISION, 2)])
def test_the_projector_that_a_method_added_trains_in_place_of_the_models_own(family, scale):
    handle = apply(family, vltok.TokenPacker(scale_factor=scale))
    set_trainable(handle, "projector")
    assert "model.multi_modal_projector.q_proj_1.weight" in trainable(handle.model)
    assert trainable(handle.model) == under(handle.model, *PROJECTORS)


@pytest.mark.parametrize("parts", ["", "all", "projector+", "llm+llm", "projector,llm"])
def test_unknown_and_doubled_parts_are_refused(parts):
    with pytest.raises(ValueError, match="parts out of projector, llm, tower"):
        set_trainable(apply(LLAVA), parts)


def test_a_parameter_in_no_known_part_is_an_error_that_names_it():
    handle = apply(LLAVA)
    handle.host.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"model\.extra\.weight"):
        set_trainable(handle, "projector")


def test_lora_trains_the_decoder_by_updates_and_what_was_added_in_full():
    handle = apply(LLAVA, vltok.TokenPacker(scale_factor=2))
    inputs = LLAVA.inputs(["w1 <image> w2"], [tiny.picture(0)], processor=handle.processor)
    before = handle.model(**inputs).logits
    set_trainable(handle, "projector+llm")
    model = add_lora(handle, 2, targets=["q_proj", "down_proj"])
    names = trainable(model)
    added = {name for name in names if "multi_modal_projector" in name}
    assert len(added) == len(list(handle.added_modules[0].parameters()))
    assert names - added == {
        f"base_model.model.model.language_model.layers.{layer}.{place}.lora_{side}.default.weight"
        for layer in range(4)
        for place in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
    }
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(handle.model(**inputs).logits, before)


@pytest.mark.parametrize("family", [LLAVA, QWEN2_5_VL, INTERNVL], ids=lambda family: family.name)
def test_lora_takes_all_linear_layers_of_the_decoder_by_default(family):
    handle = apply(family)
    set_trainable(handle, "llm")
    model = add_lora(handle, 2, alpha=7, dropout=0.1)
    linear = sum(isinstance(m, torch.nn.Linear) for m in family.model().model.language_model.modules())
    assert len(trainable(model)) == 2 * linear
    assert all("language_model" in name and "lora_" in name for name in trainable(model))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 7, 0.1)


def test_lora_that_could_not_be_saved_or_placed_is_refused():
    handle = apply(LLAVA)
    set_trainable(handle, "projector")
    with pytest.raises(ValueError, match='include "llm"'):
        add_lora(handle, 2)
    set_trainable(handle, "projector+llm")
    with pytest.raises(ValueError, match='use train="llm"'):
        add_lora(handle, 2)
    set_trainable(handle, "llm")
    with pytest.raises(ValueError, match=r"must be among down_proj, gate_proj.*got fc1"):
        add_lora(handle, 2, targets=["fc1"])
    assert not any("lora" in name for name, _ in handle.model.named_modules())
