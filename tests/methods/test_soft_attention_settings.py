"""What SoftmaxFreeAttention refuses, and how it reads released weights."""

from __future__ import annotations

import pytest
import torch

from vltok.errors import CheckpointError
from vltok.nn import SoftmaxFreeAttention


@pytest.mark.parametrize("prefix", ["", "block1.0.att.mha."])
def test_from_official_finds_weights_behind_a_prefix_and_reads_sizes_and_dtype(prefix):
    weights = {
        prefix + key: value for key, value in SoftmaxFreeAttention(32, 4, 2, 5).to(torch.bfloat16).state_dict().items()
    }
    weights |= {"block1.0.mlp.fc1.weight": torch.zeros(2)} if prefix else {}
    built = SoftmaxFreeAttention.from_official(weights, False, 7, 3, "torch")
    assert (built.dim, built.num_heads, built.attn.ratio, built.attn.conv.kernel_size) == (32, 4, 2, (5, 5))
    assert (
        "num_heads=4, ratio=2, normalize=False, newton_iters=7, num_prefix_tokens=3, backend='torch', parity=True"
        in (repr(built))
    )
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, weights[prefix + key]) for key, value in built.state_dict().items())
    with torch.no_grad():
        built.ff.weight.zero_()
    assert weights[f"{prefix}ff.weight"].any(), "the new module must not share the given weights"


def test_from_official_lists_what_is_missing_unexpected_or_misshapen():
    build, weights = SoftmaxFreeAttention.from_official, SoftmaxFreeAttention(16, 2, 3, 3).state_dict()
    wrong = {key: value for key, value in weights.items() if key not in ("W_v.bias", "ff.weight")}
    with pytest.raises(
        CheckpointError, match=r"a softmax-free attention: missing W_v\.bias, ff\.weight; unexpected extra"
    ):
        build(wrong | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"ff\.bias has shape \(3,\), expected \(16,\)"):
        build(weights | {"ff.bias": torch.zeros(3)})
    with pytest.raises(
        CheckpointError, match=r"Qlandmark_op\.weight has shape \(8, 8, 2, 3\), expected \(8, 8, 3, 3\)"
    ):
        build(weights | {"attn.Qlandmark_op.weight": torch.zeros(8, 8, 2, 3)})
    with pytest.raises(CheckpointError, match=r"missing W_q\.bias, W_q\.weight.*; unexpected linear\.weight"):
        build({"linear.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"missing W_q\.bias"):
        build({})
    for shape in ((3, 1, 3, 3), (2, 1, 4, 4), (0, 1, 3, 3)):  # heads that don't divide, an even size, no heads
        with pytest.raises(CheckpointError):
            build(weights | {"attn.conv.weight": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads must divide dim=16, got 3"),
        ({"conv_size": 4}, ValueError, "conv_size must be odd, so that the convolution keeps the grid; got 4"),
        ({"ratio": 0}, ValueError, "ratio must be at least 1, got 0"),
        ({"dim": -16}, ValueError, "dim must be at least 1, got -16"),
        ({"newton_iters": 0}, ValueError, "newton_iters must be at least 1, got 0"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be at least 0, got -1"),
        ({"ratio": True}, TypeError, "ratio must be an integer of at least 1, got True"),
        ({"dim": 16.0}, TypeError, r"dim must be an integer of at least 1, got 16\.0"),
        ({"num_prefix_tokens": False}, TypeError, "num_prefix_tokens must be an integer of at least 0, got False"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, kind, message):
    with pytest.raises(kind, match=message):
        SoftmaxFreeAttention(**({"dim": 16, "num_heads": 2, "ratio": 2, "conv_size": 3} | changes))


def test_tokens_that_do_not_form_the_grid_are_refused():
    attention = SoftmaxFreeAttention(16, 2, 3, 3, num_prefix_tokens=1)
    with pytest.raises(ValueError, match="20 tokens are not 1 prefix tokens and a grid of 4 x 5 = 20; pass the grid"):
        attention(torch.zeros(1, 20, 16), (4, 5))
    for shape in ((21, 16), (1, 21, 8), (1, 1, 21, 16)):
        with pytest.raises(ValueError, match=r"x must be \(B, N, 16\), got \(.*\)"):
            attention(torch.zeros(shape), (4, 5))
    for grid in ((2, 10), (10, 2)):
        with pytest.raises(
            ValueError, match=r"ratio=3 is larger than the grid of .*; use a ratio of at most 2, or a l"
        ):
            attention(torch.zeros(1, 21, 16), grid)
