"""What vision towers refuse, by whom and with what words, and what stands next to it and works."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from towers import REPLACEABLE, TIMM, TOWERS, WIDTHS, draw, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import UnsupportedModelError

SOFT = vltok.SOFT(ratio=2)


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


@pytest.mark.parametrize("make", [vit, eva])
@pytest.mark.parametrize("method", [SOFT, vltok.TAP(), vltok.ADL()], ids=["soft", "tap", "adl"])
def test_patches_that_are_dropped_in_training_leave_no_grid(make, method):
    model = make(patch_drop_rate=0.5).train()
    if method.name != "adl":
        with unchanged(model), pytest.raises(UnsupportedModelError, match=r"patch_drop_rate=0\.5\), .* set model"):
            vltok.apply(model, method)
        model.patch_drop.prob = 0.0
    with torch.enable_grad(), vltok.apply(model, method) as handle:
        (model(pixels()).sum() + handle.loss()).backward()


@pytest.mark.parametrize("method", [SOFT, vltok.TAP()], ids=["soft", "tap"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_blocks_are_refused_and_methods_may_come_first(method, offload, tmp_path):
    import accelerate

    tower = TOWERS["clip"]
    first, model = copy.deepcopy(shared_tower(tower)), copy.deepcopy(shared_tower(tower))
    with draw(vltok.apply(first, method)):
        expected = tower.answer(first, pixels())
        accelerate.cpu_offload(first, execution_device=torch.device("cpu"))
        assert torch.equal(tower.answer(first, pixels()), expected)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    plain = tower.answer(model, pixels())
    with pytest.raises(UnsupportedModelError, match=r"offloaded \(on the meta device, .*before offloading"):
        vltok.apply(model, method)
    assert torch.equal(tower.answer(model, pixels()), plain)
    with vltok.apply(model.train(), vltok.ADL(threshold=1.2)) as handle:
        assert torch.equal(tower.answer(model, pixels()), plain)
        assert handle.loss() > 0


def test_sharded_blocks_are_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(shared_tower(TOWERS["clip"]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for method in (SOFT, vltok.TAP()):
            with pytest.raises(UnsupportedModelError, match=r"sharded over processes .* before sharding the model"):
                vltok.apply(model, method)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, each)
        for name in TOWERS
        for each in (SOFT, vltok.TAP(), vltok.ADL())
        if name in REPLACEABLE or each is not SOFT
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_pixels_of_another_dtype_count_as_they_do_without_a_method(name, dtype, method):
    tower, model = TOWERS[name], shared_tower(TOWERS[name])
    shown = (pixels().abs() * 100).round().clamp(0, 255)

    def answered(as_dtype: torch.dtype) -> torch.Tensor | type[Exception]:
        try:
            return tower.answer(model, shown.to(as_dtype))
        except RuntimeError as error:  # of the patch layer
            return type(error)

    plain = answered(dtype)
    with draw(vltok.apply(model, method)):
        found, expected = answered(dtype), answered(torch.float32)
    if isinstance(plain, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found is plain


def test_weights_come_to_the_dtype_of_a_quantised_block():
    model = TOWERS["timm-vit"].model()
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with vltok.apply(model, vltok.TAP()) as handle:
        weights = [weight for module in handle.added_modules for weight in module.parameters()]
        assert {weight.dtype for weight in weights} == {torch.float32}


def test_attention_that_a_loss_watches_stays():
    model = shared_tower(TOWERS["clip"])
    with vltok.apply(model, vltok.ADL()), unchanged(model), pytest.raises(ValueError, match="watched by a loss"):
        vltok.apply(model, SOFT)
