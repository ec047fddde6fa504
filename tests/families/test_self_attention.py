"""Reading self-attention: what was read computes what the module does, and what is more than that is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import Attention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import DiffAttention
from torch import nn
from torch.nn import functional as F
from towers import REPLACEABLE, TOWERS, shared_tower

from vltok.engine.parts import read_attention, tokens_of
from vltok.errors import UnsupportedModelError
from vltok.families import view
from vltok.views import SelfAttention


def attend(parts: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Plain softmax attention over what was read, (B, N, C) -> (B, N, C)."""
    query, key, value = (
        F.linear(x, *projection).unflatten(-1, (parts.num_heads, -1)).transpose(1, 2)
        for projection in (parts.query, parts.key, parts.value)
    )
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return F.linear((weights @ value).transpose(1, 2).flatten(2), *parts.out)


def assert_reads(module: nn.Module, parts: SelfAttention) -> None:
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    output = module(x)
    expected = output[0] if isinstance(output, tuple) else output
    assert parts.module is module
    torch.testing.assert_close(attend(parts, x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_the_sizes_it_was_made_with(name):
    vision = view(shared_tower(TOWERS[name])).vision
    assert (vision.dim, vision.depth, vision.grid) == (32, 3, TOWERS[name].grid)
    assert vision.num_prefix_tokens == TOWERS[name].prefix


@pytest.mark.parametrize("name", REPLACEABLE)
def test_what_was_read_of_a_tower_computes_what_its_attention_does(name):
    vision = view(shared_tower(TOWERS[name])).vision
    for block in range(3):
        parts = vision.self_attention(block)
        assert_reads(vision.attention_module(block), parts)


EVA = partial(EvaAttention, 32, num_heads=4, scale_norm=False)


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (partial(Attention, 32, num_heads=4, qkv_bias=True), set()),
        (partial(Attention, 32, num_heads=4), {"query", "key", "value"}),
        (partial(Attention, 32, num_heads=4, qkv_bias=True, proj_bias=False), {"out"}),
        (EVA, set()),  # the key's bias is a buffer of zeros
        (partial(EVA, qkv_bias=False), {"query", "key", "value"}),
        (partial(EVA, qkv_fused=False), {"key"}),
    ],
    ids=["fused", "fused, no bias", "no bias at the end", "eva", "eva, no bias", "eva, separate"],
)
def test_each_way_to_keep_weights_and_biases_is_read(make, missing):
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    parts = read_attention(module, 32)
    assert_reads(module, parts)
    assert parts.num_heads == 4
    assert {role for role in ("query", "key", "value", "out") if getattr(parts, role)[1] is None} == missing


WEIGHTLESS = partial(nn.LayerNorm, elementwise_affine=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Attention, 32, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm), r"q_norm\.weight"),
        (partial(Attention, 32, num_heads=4, qk_norm=True, norm_layer=WEIGHTLESS), "further parts, q_norm, k_norm"),
        (partial(Attention, 32, num_heads=4, scale_norm=True, norm_layer=nn.LayerNorm), r"norm\.weight"),
        (partial(Attention, 32, num_heads=4, gated=True), "has further weights"),
        (partial(DiffAttention, 32, num_heads=4), "lambda_q1"),
        (partial(Attention, 32, num_heads=4, attn_head_dim=4), r"projects query by \(16, 32\)"),
        (partial(Attention, 32, num_heads=4, dim_out=16), r"projects out by \(16, 32\)"),
    ],
    ids=[
        "norm of queries",
        "norm without weights",
        "norm of the sum",
        "gate",
        "differential",
        "head width",
        "output width",
    ],
)
def test_attention_that_is_more_than_that_is_refused(make, message):
    with pytest.raises(UnsupportedModelError, match=f"can't be replaced: (Diff)?Attention .*{message}.*CLIP, SigLIP"):
        read_attention(make(), 32)


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"vision tower, Attention, has weights that are offloaded"):
        read_attention(Attention(32, num_heads=4, device="meta"), 32)


class Packed(torch.Tensor):
    """Stands for the packed weights of libraries that quantise."""


def test_quantised_weights_are_refused_by_name():
    module = Attention(32, num_heads=4)
    module.proj.weight = nn.Parameter(module.proj.weight.detach().as_subclass(Packed))
    with pytest.raises(UnsupportedModelError, match=r"projects out by quantised weights \(Packed\)"):
        read_attention(module, 32)
    module.proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="projects out by quantised weights"):
        read_attention(module, 32)


def test_an_attention_without_its_projections_is_refused():
    module = Attention(32, num_heads=4)
    module.proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="has no linear layer for out"):
        read_attention(module, 32)


X = torch.zeros(1, 5, 32)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, None), {}),
        ((), {"hidden_states": X}),
        ((), {"hidden_states": X, "attention_mask": None}),
        ((X,), {"attn_mask": None, "is_causal": False, "rope": None}),
        ((X,), {"output_hidden_states": True, "interpolate_pos_encoding": True, "output_attentions": False}),
    ],
)
def test_tokens_are_found_among_the_arguments_of_every_block(args, kwargs):
    assert tokens_of(nn.Identity(), args, kwargs) is X


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((X, torch.ones(5, 5)), {}, "argument 1"),
        ((), {"hidden_states": X, "attention_mask": torch.ones(5, 5)}, "attention_mask"),
        ((X,), {"rope": torch.ones(5, 8)}, "rope"),
        ((X,), {"is_causal": True}, "is_causal"),
        ((X,), {"attn_mask": torch.ones(5, 5), "output_attentions": True}, "attn_mask, output_attentions"),
    ],
)
def test_a_block_that_asks_for_more_than_attention_from_all_to_all_is_refused(args, kwargs, named):
    with pytest.raises(ValueError, match=f"Identity attends from all tokens to all, .* by {named}: masks, rotary"):
        tokens_of(nn.Identity(), args, kwargs)
