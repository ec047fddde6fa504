"""SoftmaxFreeAttention against the released module's numbers and a plain version written from the papers."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from vltok.nn import SoftmaxFreeAttention

DATA = Path(__file__).parents[1] / "data"
SETTINGS = json.loads((DATA / "soft_attn.json").read_text())
CONVERGED = [name for name in SETTINGS if "illconditioned" not in name and name != "norm_r2_c3_8x8"]
NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "norm"])


def make(
    heads: int = 2, width: int = 8, ratio: int = 2, conv: int = 3, seed: int = 0, **kwargs
) -> SoftmaxFreeAttention:
    """Weights at which landmarks are apart, kernels don't vanish and every norm and bias counts."""
    attention = SoftmaxFreeAttention(heads * width, heads, ratio, conv, **kwargs)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
        attention.attn.Qnorm_act[0].weight.add_(1).mul_(2)
    return attention


def tokens(attention: SoftmaxFreeAttention, grid: tuple[int, int], batch: int = 2, seed: int = 1) -> torch.Tensor:
    count = attention.attn.num_prefix_tokens + grid[0] * grid[1]
    return torch.randn(batch, count, attention.dim, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def plain(attention: SoftmaxFreeAttention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Region by region and shift by shift, kernels by differences, the (pseudo-)inverse by torch.linalg."""
    inner, weights, (height, width) = attention.attn, dict(attention.named_parameters()), grid
    ratio, prefix, heads = inner.ratio, inner.num_prefix_tokens, attention.num_heads
    depth = attention.dim // heads
    query, value = (
        torch.einsum("bnc,oc->bno", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"] for name in ("W_q", "W_v")
    )
    query, value = (each.unflatten(-1, (heads, depth)) for each in (query / depth**0.25, value))  # (B, N, heads, d)

    image, landmarks = query[:, prefix:].unflatten(1, grid), []
    round_up = 0 if inner.parity else ratio - 1
    for top in range((height + round_up) // ratio):
        for left in range((width + round_up) // ratio):
            mark = 0
            for i in range(ratio):
                for j in range(ratio):
                    cell = image[:, min(top * ratio + i, height - 1), min(left * ratio + j, width - 1)]
                    mark = mark + torch.einsum("bhd,od->bho", cell, weights["attn.Qlandmark_op.weight"][:, :, i, j])
            mark = (mark - mark.mean(-1, keepdim=True)) / (mark.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            mark = mark * weights["attn.Qnorm_act.0.weight"] + weights["attn.Qnorm_act.0.bias"]
            landmarks.append(mark * (1 + torch.erf(mark / 2**0.5)) / 2)
    marks = torch.cat([torch.stack(landmarks, 1), query[:, :prefix]], 1)  # (B, M, heads, d)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1) / 2).permute(0, 3, 1, 2)

    near, among = kernel(query, marks), kernel(marks, marks)
    if inner.normalize:
        scale = among.sum(-1) ** -0.5
        inverse = scale.unsqueeze(-1) * torch.linalg.pinv(among, hermitian=True) * scale.unsqueeze(-2)
        if inner.parity:
            inverse = scale.unsqueeze(-1) * released(among) * scale.unsqueeze(-2)
    else:
        inverse = torch.linalg.inv(among + 0.01 * torch.eye(among.shape[-1], dtype=x.dtype))
    attended = torch.einsum("bhnm,bhmk,bhlk,blhd->bnhd", near, inverse, near, value)

    pictures, size = value[:, prefix:].unflatten(1, grid), inner.conv.kernel_size[0]
    padded = torch.zeros(len(x), height + size - 1, width + size - 1, heads, depth, dtype=x.dtype)
    padded[:, size // 2 : size // 2 + height, size // 2 : size // 2 + width] = pictures
    convolved = sum(
        padded[:, i : i + height, j : j + width] * weights["attn.conv.weight"][:, 0, i, j, None]
        for i in range(size)
        for j in range(size)
    )
    attended = attended + torch.cat([torch.zeros_like(value[:, :prefix]), convolved.flatten(1, 2)], 1)
    return torch.einsum("bnc,oc->bno", attended.flatten(2), weights["ff.weight"]) + weights["ff.bias"]


def released(matrices: torch.Tensor) -> torch.Tensor:
    """The inverse of the released normalised variant: one start for the whole batch, halved until it converges."""
    one, alpha = torch.eye(matrices.shape[-1], dtype=matrices.dtype), 2 / matrices.sum(-1).max() ** 2
    for _ in range(10):
        if (one - alpha * matrices @ matrices).abs().sum(-2).max() > 1.01:
            alpha = alpha / 2
    inverse = alpha * matrices
    for _ in range(20):
        inverse = 2 * inverse - inverse @ matrices @ inverse
    return inverse


def golden(normalize: bool, scale: dict[str, float], seed: int, grid: list[int], batch: int, **sizes: int):
    """Weights and inputs, which depend on seed and name alone: state dict, x, the weights of the loss, the grid."""

    def draw(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        stream = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
        noise = stream.standard_normal(shape)
        if key.startswith("input:"):
            return torch.from_numpy(noise).float()
        if len(shape) > 1:
            noise = noise / np.prod(shape[1:]) ** 0.5
        else:
            noise = 1 + 0.2 * noise if key.endswith("weight") else 0.1 * noise
        factor = next((factor for part, factor in scale.items() if part in key), 1.0)
        return torch.from_numpy(noise).float() * factor

    template = SoftmaxFreeAttention(**sizes).state_dict()
    shape = (batch, grid[0] * grid[1], sizes["dim"])
    inputs = draw("input:x", shape), draw("input:cot", shape)
    return {key: draw(key, tuple(value.shape)) for key, value in template.items()}, *inputs, tuple(grid)


def compare(attention: SoftmaxFreeAttention, name: str, inputs: tuple) -> dict[str, torch.Tensor]:
    """Check the output and all gradients that the file of this name has."""
    x, loss_weights, grid = inputs
    expected = load_file(DATA / f"soft_attn_{name}.safetensors")
    out = attention(x.requires_grad_(), grid)
    (out * loss_weights).sum().backward()
    found = {"grad_cot.x": x.grad}
    found |= {f"grad_cot.{key}": parameter.grad for key, parameter in attention.named_parameters()}
    forward, backward = {"plain_ill": (2e-4, 1e-3), "norm_illc": (1e-5, 1e-5)}.get(name[:9], (1e-5, 5e-5))
    assert error(out, expected["out.y"]) < forward
    gradients = expected.keys() - {"out.y", "out64.y"}
    assert len(gradients) == 6
    for key in gradients:
        assert error(found[key], expected[key]) < backward, key
    return expected


@pytest.mark.parametrize("name", SETTINGS)
def test_released_weights_give_the_released_outputs_and_gradients(name):
    """Also with the unconverged inverses of three of the files, which an exact inverse misses by 1e-2."""
    weights, *inputs = golden(**SETTINGS[name])
    attention = SoftmaxFreeAttention.from_official(weights, SETTINGS[name]["normalize"])
    expected = compare(attention, name, inputs)
    if "out64.y" in expected:
        with torch.no_grad():
            assert error(attention.double()(inputs[0].double(), inputs[-1]), expected["out64.y"]) < 1e-9


@pytest.mark.parametrize("name", CONVERGED)
def test_the_checked_inverse_changes_nothing_where_the_released_one_converged(name):
    weights, *inputs = golden(**SETTINGS[name])
    attention = SoftmaxFreeAttention.from_official(weights, SETTINGS[name]["normalize"], parity=False)
    compare(attention, name, inputs)


def gradients(attention: SoftmaxFreeAttention, x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(out.float().square().mean(), [x, *attention.parameters()])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ratio=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), normalize=st.booleans())
def test_it_equals_plain_mathematics_on_any_grid(data, ratio, heads, normalize):
    grid = tuple(data.draw(st.integers(ratio, 2 * ratio + 3), label=side) for side in ("height", "width"))
    prefix, conv = data.draw(st.integers(0, 3), label="prefix"), data.draw(st.sampled_from([1, 3, 5]), label="conv")
    attention = make(heads, 8, ratio, conv, normalize=normalize, num_prefix_tokens=prefix).double()
    x = tokens(attention, grid).double().requires_grad_()
    out, expected = attention(x, grid), plain(attention, x, grid)
    assert error(out, expected) < 1e-6
    for found, reference in zip(gradients(attention, x, out), gradients(attention, x, expected), strict=True):
        assert error(found, reference) < 1e-4


@NORMALIZE
@pytest.mark.parametrize("prefix", [0, 2])
def test_released_landmarks_leave_out_trailing_rows_and_columns(normalize, prefix):
    attention = make(normalize=normalize, num_prefix_tokens=prefix, parity=True).double()
    x = tokens(attention, (7, 5)).double().requires_grad_()
    out, expected = attention(x, (7, 5)), plain(attention, x, (7, 5))
    assert error(out, expected) < 1e-6
    for found, reference in zip(gradients(attention, x, out), gradients(attention, x, expected), strict=True):
        assert error(found, reference) < 1e-4
    attention.attn.parity = False
    assert error(attention(x, (7, 5)), expected) > 1e-3


def test_the_attention_counts_in_these_tests():
    for normalize in (False, True):
        attention = make(normalize=normalize, num_prefix_tokens=1)
        with torch.no_grad():
            whole = attention(x := tokens(attention, (6, 6)), (6, 6))
            attention.W_q.weight.mul_(100)  # kernels vanish
            assert error(attention(x, (6, 6)), whole) > 0.1


def spoiled(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Tokens that are hard to invert for."""
    kinds = {
        "zeros": lambda: x * 0,
        "constant": lambda: x[:, :1].expand_as(x),
        "nearly constant": lambda: x[:, :1] + 1e-3 * x,
        "duplicates": lambda: x[:, torch.arange(x.shape[1]) // 4 * 4],
        "large": lambda: x * 1e4,
        "small": lambda: x * 1e-4,
        "large and constant": lambda: x[:, :1].expand_as(x) * 1e4,
        "one large": lambda: torch.cat([x[:, :1] * 1e4, x[:, 1:]], 1),
    }
    return kinds[kind]().clone()


KINDS = ("zeros", "constant", "nearly constant", "duplicates", "large", "small", "large and constant", "one large")


@NORMALIZE
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_inputs_give_what_double_precision_gives(kind, prefix, normalize):
    for width in (8, 64):
        attention = make(2, width, normalize=normalize, num_prefix_tokens=prefix)
        x = spoiled(tokens(attention, (6, 7)), kind).requires_grad_()
        out = attention(x, (6, 7))
        assert all(gradient.isfinite().all() for gradient in gradients(attention, x, out))
        assert error(out, attention.double()(x.double(), (6, 7))) < 1e-3


@settings(max_examples=25, deadline=None)
@given(
    sides=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    ratio=st.integers(1, 3),
    batch=st.integers(2, 5),
    normalize=st.booleans(),
    prefix=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
)
def test_a_sample_is_answered_alike_alone_and_in_any_batch(sides, ratio, batch, normalize, prefix, kind):
    attention = make(ratio=ratio, normalize=normalize, num_prefix_tokens=prefix)
    x = tokens(attention, sides, batch)
    x[1:] = spoiled(x[1:], kind)
    x[batch - 1, 0, 0] = torch.nan
    with torch.no_grad():
        together, alone = attention(x, sides), attention(x[:1], sides)
    assert error(together[:1], alone) < 1e-5
    assert together[-1].isnan().any(), "what is not a number stays visible"


def test_released_normalised_attention_depends_on_the_batch():
    attention = make(normalize=True, parity=True)
    x = tokens(attention, (8, 8))
    x[1] = 0
    with torch.no_grad():
        attention.attn.Qnorm_act[0].weight.mul_(0.2)  # twenty steps from the neighbour's start are too few
        assert error(attention(x, (8, 8))[:1], attention(x[:1], (8, 8))) > 1e-3
        attention.attn.parity = False
        assert error(attention(x, (8, 8))[:1], attention(x[:1], (8, 8))) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    ratio=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    width=st.integers(1, 9),
    prefix=st.integers(0, 2),
    variant=st.sampled_from([(False, False), (True, False), (False, True)]),  # the released normalised one can diverge
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_outputs_have_the_shape_and_dtype_of_the_tokens(grid, ratio, heads, width, prefix, variant, dtype):
    normalize, parity = variant
    attention = make(heads, width, ratio, normalize=normalize, parity=parity, num_prefix_tokens=prefix)
    x = tokens(attention, grid, 3).to(dtype).requires_grad_()
    out = attention.to(dtype)(x, grid)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients(attention, x, out))


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_another_dtype_stays_near_float32(dtype, normalize):
    attention = make(normalize=normalize, num_prefix_tokens=1)
    x = tokens(attention, (7, 6)).requires_grad_()
    other, y = copy.deepcopy(attention).to(dtype), x.detach().to(dtype).requires_grad_()
    expected, found = attention(x, (7, 6)), other(y, (7, 6))
    assert found.dtype == dtype
    bound = 1e-5 if dtype == torch.float64 else 0.1
    assert error(found, expected) < bound
    pairs = zip(gradients(other, y, found), gradients(attention, x, expected), strict=True)
    for gradient, reference in pairs:
        assert gradient.dtype == dtype
        assert torch.nn.functional.cosine_similarity(gradient.flatten().double(), reference.flatten().double(), 0) > 0.9


@NORMALIZE
def test_autocast_reaches_the_linear_layers_alone(normalize):
    attention = make(normalize=normalize, num_prefix_tokens=1)
    x = tokens(attention, (7, 6)).requires_grad_()
    inside = []
    attention.attn.register_forward_hook(lambda _, args, output: inside.append((args, output)))
    expected = attention(x, (7, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, (7, 6))
    (query, value, _), attended = inside[1]
    assert (query.dtype, attended.dtype, out.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert error(attended, attention.attn(query.float(), value.float(), (7, 6))) < 1e-6
    assert error(out, expected) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in gradients(attention, x, out))


@NORMALIZE
def test_it_is_an_ordinary_module(normalize):
    attention = make(normalize=normalize, num_prefix_tokens=2)
    x = tokens(attention, (6, 5)).requires_grad_()
    before = x.detach().clone()
    out = attention(x, (6, 5))
    assert torch.equal(x, before) and out.shape == x.shape
    found = gradients(attention, x, out)
    assert all(gradient.abs().sum() > 0 for gradient in found), "gradients reach the input and every parameter"
    fresh = SoftmaxFreeAttention(16, 2, 2, 3, normalize, num_prefix_tokens=2, backend="torch")
    fresh.load_state_dict(attention.state_dict())
    for other in (fresh, copy.deepcopy(attention)):
        assert torch.equal(other(x, (6, 5)), out)
    with torch.inference_mode():
        torch.testing.assert_close(attention(x, (6, 5)), out)
    for reentrant in (True, False):
        x.grad = None
        checkpoint(attention, x, (6, 5), use_reentrant=reentrant).square().mean().backward()
        torch.testing.assert_close(x.grad, found[0])
    with torch.no_grad():
        copy.deepcopy(attention).W_q.weight.zero_()
    assert torch.equal(attention(x, (6, 5)), out)
    assert attention(x[:0], (6, 5)).shape == (0, 32, 16)
