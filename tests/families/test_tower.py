"""Vision towers: which grid an attention is told, what is refused, and what stands around a tower."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import LLAVA, LLAVA_NEXT, picture, shared_model
from torch import nn
from towers import HF, TIMM, TOWERS, WIDTHS, draw, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import EditConflictError, UnsupportedModelError

SOFT = vltok.SOFT(ratio=2)
ANY_SIZE = [name for name, tower in TOWERS.items() if tower.any_size is not None]


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


# Blocks that are recomputed in a backward pass, when other pictures have passed since


def accumulate(name: str, schedule: list[tuple[int, ...]], checkpoint: bool | str) -> dict[str, torch.Tensor]:
    """Gradients of a copy: a (height, width) of the schedule is a forward, () takes all backward, (0,) looks on."""
    tower = TOWERS[name]
    model = copy.deepcopy(shared_tower(tower)).train()
    if checkpoint and tower.is_hf:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": checkpoint == "reentrant"}
        )
    elif checkpoint:
        model.set_grad_checkpointing()
    losses = []
    with torch.enable_grad(), draw(vltok.apply(model, SOFT)):
        for size in schedule:
            if not size:
                sum(losses).backward()
                losses.clear()
            elif size == (0,):
                with torch.no_grad():
                    tower.answer(model, pixels(1, 40, 24), **tower.any_size)
                tower.answer(model.eval(), pixels(1), **tower.any_size)
                model.train()
            else:
                losses.append(tower.answer(model, pixels(2, *size), **tower.any_size).square().sum())
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


CHECKPOINTS = [("clip", "reentrant"), ("clip", "plain"), ("timm-vit", "plain")]


@pytest.mark.parametrize(("name", "checkpoint"), CHECKPOINTS)
@pytest.mark.parametrize(
    "schedule",
    [
        [(24, 40), (), (40, 24), ()],
        [(24, 40), (32, 32), ()],
        [(24, 40), (32, 32), (24, 40), ()],
        [(24, 40), (0,), ()],
    ],
    ids=["the same count in turns", "two sizes", "three passes", "evaluation between"],
)
def test_recomputed_blocks_are_told_the_grid_they_had(name, checkpoint, schedule):
    expected = accumulate(name, schedule, False)
    found = accumulate(name, schedule, checkpoint)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=key)


@pytest.mark.parametrize(("name", "checkpoint"), CHECKPOINTS)
def test_grids_that_recomputed_blocks_cannot_tell_apart_are_refused(name, checkpoint):
    accumulate(name, [(24, 40), (40, 24), ()], False)
    both = r"grids \((3, 5|5, 3)\) and \((3, 5|5, 3)\) passed through the vision tower before this backward pass"
    with pytest.raises(ValueError, match=f"{both}, so .* call backward\\(\\) after each"):
        accumulate(name, [(24, 40), (40, 24), ()], checkpoint)


def test_what_passes_through_a_copy_does_not_count():
    tower = TOWERS["timm-vit"]
    model = copy.deepcopy(shared_tower(tower)).train()
    model.set_grad_checkpointing()
    with torch.enable_grad(), vltok.apply(model, SOFT):
        twin = copy.deepcopy(model)
        loss = model(pixels(1, 24, 40)).sum()
        twin(pixels(1, 40, 24))
        loss.backward()


# What is refused


def vit(**settings) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**TIMM, **settings)


def eva(**settings) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**TIMM, **settings)


def other_block(name: str) -> nn.Module:
    from timm.models import vision_transformer

    return vit(block_fn=getattr(vision_transformer, name))


class LinearPatches(nn.Module):
    """Makes patches without a convolution."""

    grid_size, num_patches = (4, 4), 16

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * 64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2))


def linear_patches() -> nn.Module:
    model = vit()
    model.patch_embed = LinearPatches()
    assert model(pixels()).shape == (3, 5)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**WIDTHS))


def resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet10t")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit(qk_norm=True), r"Attention has further weights, q_norm\.weight"),
        (lambda: vit(attn_layer="diff"), "DiffAttention has further weights, lambda_q1"),
        (lambda: other_block("ParallelScalingBlock"), "ParallelScalingBlock, block 0 .* has no attention module"),
        (lambda: other_block("ParallelThingsBlock"), "ParallelThingsBlock, block 0 .* has no attention module"),
        (lambda: eva(use_rot_pos_emb=True), "this Eva model tells its attention where tokens are, by rotary"),
        (lambda: eva(scale_attn_inner=True), r"EvaAttention has further weights, norm\.weight"),
        (linear_patches, "VisionTransformer makes no patches by a convolution"),
        (resnet, "ResNet has no visual tokens .* know the families clip, siglip, vit, dinov2, "),
        (bert, "BertModel has no visual tokens .* know the families clip, siglip, vit, dinov2, "),
    ],
    ids=["qk norm", "differential", "parallel", "two attentions", "rotary", "inner norm", "linear", "resnet", "bert"],
)
def test_models_whose_attention_cannot_be_replaced_say_why_and_are_left_alone(make, message):
    model = make()
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        vltok.apply(model, SOFT)


@pytest.mark.parametrize("make", [lambda: other_block("ResPostBlock"), lambda: eva(use_post_norm=True)])
def test_blocks_that_norm_after_attention_are_fine(make):
    model = tiny.sharpen(make())
    plain = model(pixels())
    with unchanged(model), draw(vltok.apply(model, SOFT)):
        assert (model(pixels()) - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("method", [vltok.DivPrune(keep_ratio=0.5), vltok.ToDRE(stages=(2,)), vltok.TokenPacker()])
@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_methods_for_visual_tokens_are_refused_by_a_tower_alone(name, method):
    model = shared_tower(TOWERS[name])
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"a vision tower .* alone has no language model"):
        vltok.apply(model, method)
    with unchanged(model), pytest.raises(UnsupportedModelError, match="alone has no language model"):
        vltok.apply(model, [SOFT, method])


def test_masks_and_lost_patches_are_refused_when_pictures_come():
    model = shared_tower(TOWERS["vit"])
    with vltok.apply(model, SOFT):
        mask = torch.ones(3, 17, dtype=torch.long)
        assert torch.equal(model(pixels(), attention_mask=mask)[0], model(pixels())[0])
        mask[:, -1] = 0
        with pytest.raises(ValueError, match="asks for more, by argument 1: masks"):
            model(pixels(), attention_mask=mask)
    model = shared_tower(TOWERS["timm-vit"])
    with vltok.apply(model, SOFT), pytest.raises(ValueError, match="asks for more, by is_causal"):
        model.forward_features(pixels(), is_causal=True)
    model = vit(patch_drop_rate=0.5).train()
    with vltok.apply(model, SOFT), pytest.raises(ValueError, match="9 tokens are not 1 prefix tokens and a grid"):
        model(pixels())


# Beside other methods, and inside other models

WATCHING = [vltok.FasterVLM(keep_ratio=0.5), vltok.ToDRE(keep_ratio=0.5, pivot="cls", relevance=False)]


@pytest.mark.parametrize("method", WATCHING, ids=["fastervlm", "todre"])
def test_attention_that_a_pruning_method_reads_stays(method):
    model = shared_model(LLAVA)
    for methods in ([SOFT, method], [method, SOFT]):
        message = "no q_proj and k_proj to read attention from" if methods[0] is SOFT else "is being watched by"
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
