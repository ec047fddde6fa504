"""Vision towers: which grid an attention is told, what is refused, and what stands around a tower."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import LLAVA, LLAVA_NEXT, picture, shared_model
from towers import HF, REPLACEABLE, TIMM, TOWERS, draw, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import EditConflictError, UnsupportedModelError

SOFT = vltok.SOFT(ratio=2)
ANY_SIZE = [name for name in REPLACEABLE if TOWERS[name].any_size is not None]


def grids_told(handle: vltok.Handle) -> list[tuple[int, int]]:
    """Grows by the grid that each new attention is called with."""
    told = []
    for module in handle.added_modules:
        module.attn.register_forward_pre_hook(lambda module, args: told.append(tuple(args[2])))
    return told


@pytest.mark.parametrize("name", ANY_SIZE)
def test_attention_is_told_the_grid_of_the_pictures_at_hand(name):
    tower = TOWERS[name]
    model = shared_tower(tower)
    with vltok.apply(model, SOFT) as handle:
        told = grids_told(handle)
        for height, width in ((24, 40), (40, 24), (32, 32)):
            tower.answer(model, pixels(1, height, width), **tower.any_size)
    assert told == [(3, 5)] * 3 + [(5, 3)] * 3 + [(4, 4)] * 3


def test_llava_crops_pass_as_pictures_of_the_tower():
    model = shared_model(LLAVA_NEXT)
    inputs = LLAVA_NEXT.inputs(["w1 <image> w2"], [picture(0, LLAVA_NEXT.size)])
    plain = model(**inputs).logits
    with draw(vltok.apply(model, SOFT)) as handle:
        told = grids_told(handle)
        changed = model(**inputs).logits
    assert told == [(3, 3)] * 3
    assert (changed - plain)[:, -1].abs().max() > 0.1 * plain.abs().max()


# Beside other methods, and inside other models

WATCHING = [vltok.FasterVLM(keep_ratio=0.5), vltok.ToDRE(keep_ratio=0.5, pivot="cls", relevance=False)]


@pytest.mark.parametrize("method", WATCHING, ids=["fastervlm", "todre"])
def test_attention_that_a_pruning_method_reads_stays(method):
    model = shared_model(LLAVA)
    for methods in ([SOFT, method], [method, SOFT]):
        message = (
            "attends by none of transformers' attention functions" if methods[0] is SOFT else "is being watched by"
        )
        refused = pytest.raises((UnsupportedModelError, ValueError), match=message)
        with unchanged(model), refused:
            vltok.apply(model, methods)
        with vltok.apply(model, methods[0]), unchanged(model), refused:
            vltok.apply(model, methods[1])


@pytest.mark.parametrize("method", [*WATCHING, vltok.StrideTokens(num_keep=3)], ids=["fastervlm", "todre", "stride"])
def test_other_blocks_can_be_replaced_beside_pruning_in_either_order(method):
    model, first = shared_model(LLAVA), vltok.SOFT(ratio=2, blocks=(0, 1))
    inputs = LLAVA.inputs(["w1 <image> w2 <image>"], [picture(0), picture(1)])
    answers, kept = [], []
    for methods in ([first, method], [method, first]):
        with unchanged(model), draw(vltok.apply(model, methods)) as handle:
            answers.append(model(**inputs).logits)
            report = handle.report(file=None)
            assert "softmax-free attention in blocks 0 to 0" in str(report)
            kept.append(report.keep_indices)
    assert torch.equal(*answers)
    with vltok.apply(model, method):
        assert not torch.equal(model(**inputs).logits, answers[0])


PACKER = vltok.TokenPacker(scale_factor=2)


@pytest.mark.parametrize("methods", [[SOFT, PACKER], [PACKER, SOFT]], ids=["attention first", "projector first"])
@pytest.mark.parametrize("handles", [1, 2])
def test_a_checkpoint_remembers_a_new_projector_and_new_attention(methods, handles, tmp_path):
    model, processor = LLAVA.model(), LLAVA.processor()
    groups = [methods] if handles == 1 else [[method] for method in methods]
    applied = [draw(vltok.apply(model, group, processor=processor)) for group in groups]
    prompt = ["w1 <image> w2"], [picture(0)]
    expected = model(**LLAVA.inputs(*prompt, processor=processor)).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if handles == 2:
        with pytest.raises(EditConflictError, match="remove the later handle first"):
            applied[0].remove()
    for handle in reversed(applied):
        handle.remove()
    with pytest.raises(KeyError, match=r"vltok\.from_pretrained"):
        type(model).from_pretrained(tmp_path)
    loaded = vltok.from_pretrained(tmp_path)
    assert [method.name for method in loaded.methods] == [method.name for method in methods]
    assert torch.equal(loaded.model(**LLAVA.inputs(*prompt, processor=loaded.processor)).logits, expected)
    loaded.remove()
    config = loaded.model.config
    assert (config.vision_config.hidden_act, config.projector_hidden_act) == ("quick_gelu", "gelu")
    assert config.vision_feature_layer == -2 and loaded.processor.patch_size == 14
    assert not hasattr(config, "vltok") and not hasattr(config.vision_config, "vltok")


@pytest.mark.parametrize("name", ["clip", "dinov2-swiglu", "timm-vit"])
def test_two_handles_on_different_blocks_add_up(name, tmp_path):
    tower, model = TOWERS[name], copy.deepcopy(shared_tower(TOWERS[name]))
    plain, config = tower.answer(model, pixels()), copy.deepcopy(getattr(model, "config", None))
    methods = [vltok.SOFT(ratio=2, blocks=(0, 1)), vltok.SOFT(ratio=4, blocks=(1, 3), normalize=False)]
    with draw(vltok.apply(model, methods)):
        expected = tower.answer(model, pixels())
    with draw(vltok.apply(model, methods[0])), draw(vltok.apply(model, methods[1])):
        assert torch.equal(tower.answer(model, pixels()), expected)
        if tower.is_hf:
            model.save_pretrained(tmp_path)
    assert torch.equal(tower.answer(model, pixels()), plain)
    if tower.is_hf:
        loaded = vltok.from_pretrained(tmp_path)
        assert torch.equal(tower.answer(loaded.model, pixels()), expected)
        loaded.remove()
        assert loaded.model.config.hidden_act == config.hidden_act


def test_a_timm_model_inside_a_model_of_transformers_is_guarded_too(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    sizes = {name: value for name, value in TIMM.items() if name != "num_classes"}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5)
    model = tiny.sharpen(TimmWrapperForImageClassification(config))
    plain = model(pixels()).logits
    with draw(vltok.apply(model, SOFT)) as handle:
        assert handle.family == "timm_vit"
        expected = model(pixels()).logits
        model.save_pretrained(tmp_path / "whole")
        vltok.save(handle, tmp_path / "own")
    assert torch.equal(model(pixels()).logits, plain)
    with vltok.load(model, tmp_path / "own"):
        assert torch.equal(model(pixels()).logits, expected)
    with pytest.raises(ValueError, match=r"vltok\.from_pretrained"):
        TimmWrapperForImageClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(vltok.from_pretrained(tmp_path / "whole").model(pixels()).logits, expected)


def test_a_backbone_of_another_model_is_loaded_with_vltok(tmp_path):
    from transformers import Dinov2Config, DPTConfig, DPTForDepthEstimation

    backbone = Dinov2Config(**HF, out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    config = DPTConfig(backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
    model = tiny.sharpen(DPTForDepthEstimation(config))
    plain = model(pixels()).predicted_depth
    with draw(vltok.apply(model, SOFT)):
        expected = model(pixels()).predicted_depth
        model.save_pretrained(tmp_path)
    assert torch.equal(model(pixels()).predicted_depth, plain) and not torch.equal(expected, plain)
    with pytest.raises(KeyError, match=r"vltok\.from_pretrained"):
        DPTForDepthEstimation.from_pretrained(tmp_path)
    assert torch.equal(vltok.from_pretrained(tmp_path).model(pixels()).predicted_depth, expected)


@pytest.mark.parametrize("name", ["clip", "dinov2", "timm-vit"])
def test_adapters_on_other_layers_go_along(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    tower = TOWERS[name]
    config = LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(shared_tower(tower)), config)
    plain = tower.answer(adapted, pixels())
    with unchanged(adapted.base_model.model), draw(vltok.apply(adapted, SOFT)) as handle:
        expected = tower.answer(adapted, pixels())
        vltok.save(handle, tmp_path)
    assert torch.equal(tower.answer(adapted, pixels()), plain) and not torch.equal(expected, plain)
    with vltok.load(adapted, tmp_path):
        assert torch.equal(tower.answer(adapted, pixels()), expected)


@pytest.mark.parametrize(("name", "layer"), [("clip", "q_proj"), ("clip", "out_proj"), ("timm-vit", "qkv")])
def test_attention_that_an_adapter_sits_on_is_refused(name, layer):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(shared_tower(TOWERS[name])), LoraConfig(target_modules=[layer], r=2))
    reasons = "no attention module|has no linear layer|has further weights"
    with unchanged(adapted.base_model.model), pytest.raises(UnsupportedModelError, match=reasons):
        vltok.apply(adapted, SOFT)


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_a_compiled_training_step_has_the_same_gradients(name):
    tower = TOWERS[name]
    model = copy.deepcopy(shared_tower(tower)).train()
    torch.compiler.reset()
    grads = []
    with torch.enable_grad(), draw(vltok.apply(model, SOFT)) as handle:
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            tower.answer(run, pixels()).square().sum().backward()
            added = [parameter for module in handle.added_modules for parameter in module.parameters()]
            grads.append([parameter.grad.clone() for parameter in added])
            model.zero_grad()
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5 * eager.abs().max().item())
