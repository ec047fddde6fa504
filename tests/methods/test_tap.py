"""TAP on real towers: the attention sees pooled tokens, the residual path the raw ones."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import sharpen
from torch.nn import functional as F
from towers import TOWERS, draw, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import UnsupportedModelError


def by_hand(name: str, model: torch.nn.Module, tokens: torch.Tensor, block: torch.nn.Module) -> torch.Tensor:
    """One block of CLIP or timm with pooling, from its parts: x + Attn(Norm(TAP(x))), then the MLP."""
    pooling = block.dilation_predictor
    prefix = TOWERS[name].prefix
    maps = tokens[:, prefix:].mT.unflatten(2, (4, 4))
    weights = (pooling.proj(maps) / pooling.temperature).softmax(1)
    mixed = weights[:, :1] * maps
    for scale in range(1, pooling.num_scales):
        near = F.unfold(maps, 3, dilation=scale, padding=scale).view(*maps.shape[:2], 9, 4, 4).mean(2)
        mixed = mixed + weights[:, scale : scale + 1] * near
    pooled = torch.cat([tokens[:, :prefix], mixed.flatten(2).mT], 1)
    if name == "clip":
        x = tokens + block.self_attn(F.layer_norm(pooled, (32,), block.layer_norm1.weight, block.layer_norm1.bias))[0]
        return x + block.mlp(block.layer_norm2(x))
    norm = block.norm1
    x = tokens + block.ls1(block.attn(F.layer_norm(pooled, (32,), norm.weight, norm.bias, norm.eps)))
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
@torch.no_grad()
def test_a_block_adds_the_attention_of_pooled_tokens_to_raw_ones(name):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    with draw(vltok.apply(model, vltok.TAP(num_scales=3))):
        seen = []
        layers = model.encoder.layers if name == "clip" else model.blocks
        hooks = [
            layer.register_forward_hook(
                lambda m, args, out: seen.append((m, args[0], out if torch.is_tensor(out) else out[0]))
            )
            for layer in layers
        ]
        TOWERS[name].tokens(model, pixels())
        for hook in hooks:
            hook.remove()
        assert len(seen) == 3
        for block, tokens, out in seen:
            torch.testing.assert_close(by_hand(name, model, tokens, block), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_it_starts_near_the_identity_by_default_and_anew_if_asked(name):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    tower = TOWERS[name]
    plain = tower.answer(model, pixels())
    with vltok.apply(model, vltok.TAP()) as handle:
        near = (tower.answer(model, pixels()) - plain).norm() / plain.norm()
        assert (
            str(handle.report(file=None)) == "vision tower: tokens pooled at 4 scales before attention in blocks 0 to 2"
        )
    torch.manual_seed(0)
    with vltok.apply(model, vltok.TAP(init="published")):
        far = (tower.answer(model, pixels()) - plain).norm() / plain.norm()
    assert near < 0.02 < far


def test_blocks_get_the_module_by_its_released_name_in_their_dtype():
    model = copy.deepcopy(shared_tower(TOWERS["timm-vit"])).to(torch.bfloat16)
    with vltok.apply(model, vltok.TAP(num_scales=2, blocks=(1, 2))) as handle:
        added = [name for name in model.state_dict() if "dilation_predictor" in name]
        assert all(name.startswith("blocks.1.dilation_predictor.proj.") for name in added) and len(added) == 7
        assert handle.methods[0].blocks == (1, 2)
        assert model.blocks[1].dilation_predictor.proj[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_gradient_checkpointing_counts_pictures_once_in_the_statistics(name, reentrant):
    counts = []
    for checkpointing in (False, True):
        model = copy.deepcopy(shared_tower(TOWERS[name])).train()
        if checkpointing:
            TOWERS[name].checkpoint(model, reentrant)
        with draw(vltok.apply(model, vltok.TAP())) as handle:
            TOWERS[name].tokens(model, pixels()).square().sum().backward()
            norms = [module.proj[1] for module in handle.added_modules]
            counts.append(
                [
                    (norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone())
                    for norm in norms
                ]
            )
            assert all(norm.momentum == 0.1 for norm in norms)
    assert all(count == 1 for _, _, count in counts[1])
    torch.testing.assert_close(counts[0], counts[1])


@pytest.mark.parametrize("block_fn", ["ResPostBlock", "ParallelScalingBlock"])
def test_blocks_of_another_order_are_refused(block_fn):
    import timm
    from timm.models import vision_transformer

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, block_fn=getattr(vision_transformer, block_fn)
    )
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"no place to pool|no attention module|no norm1"):
        vltok.apply(model, vltok.TAP())


def test_windows_of_another_size_than_the_models_are_pooled_on_their_own_grid():
    model = sharpen(TOWERS["timm-vit"].build("sdpa"))
    with draw(vltok.apply(model, vltok.TAP())), torch.no_grad():
        wide, high = pixels(1, 16, 48), pixels(1, 48, 16)
        assert model(wide).shape == model(high).shape
        turned = model(wide.mT.contiguous())
        assert not torch.allclose(turned, model(wide))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_scales": 0}, ValueError, "num_scales must be at least 1"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0"),
        ({"init": "zero"}, ValueError, "init must be one of"),
        ({"blocks": (0, 1, 2)}, TypeError, "blocks must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        vltok.TAP(**settings)
