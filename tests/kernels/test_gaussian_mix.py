"""gaussian_mix against whole kernel matrices in float64, in all ways that it may cut them into tiles."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from vltok.kernels import gaussian_mix as module
from vltok.kernels.gaussian_mix import gaussian_mix


def inputs(*batch: int, n: int = 37, m: int = 5, d: int = 3, e: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((n, d), (m, d), (n, e), (m, m))
    return [torch.randn(*batch, *shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]


def plain(query, landmarks, values, weight) -> torch.Tensor:
    kernel = torch.exp(-(query.unsqueeze(-2) - landmarks.unsqueeze(-3)).square().sum(-1) / 2)
    return kernel @ weight @ kernel.mT @ values


@pytest.fixture(params=["fused", "product by product"])
def path(request, monkeypatch):
    """Both ways of computing it: the second is that of GPUs."""
    monkeypatch.setattr(module, "_is_fused", lambda query, backend: request.param == "fused")


@pytest.mark.parametrize("tile", [1, 5, 64, 37 * 5, 2 * 37 * 5 + 3, 2**18])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_it_equals_whole_matrices_forward_and_backward(batch, tile, path, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    tensors = inputs(*batch)
    out, expected = gaussian_mix(*tensors), plain(*tensors)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_gradients_are_those_of_finite_differences(path):
    assert torch.autograd.gradcheck(gaussian_mix, inputs(2, n=6, m=3))


def test_float32_stays_float32_and_near(path):
    tensors = inputs(2, dtype=torch.float32)
    out = gaussian_mix(*tensors)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), plain(*(x.double() for x in tensors)), rtol=1e-5, atol=1e-5)


def test_tensors_that_are_not_contiguous_are_taken():
    tensors = inputs(2)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    out, expected = gaussian_mix(*turned), gaussian_mix(*tensors)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(2, 4, 37, dtype=out.dtype).mT
    for found, wanted in zip(
        torch.autograd.grad(out, turned, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_autocast_does_not_reach_inside():
    tensors = inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_mix(*tensors), gaussian_mix(*tensors[:3], tensors[3].clone()))
        assert gaussian_mix(*tensors).dtype == torch.float32


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_kernel_matrix_is_never_whole(monkeypatch):
    monkeypatch.setattr(module, "TILE", 100)
    tensors = [x.detach() for x in inputs(2, n=500, m=20)]
    with Largest() as largest:
        out, gathered = module._forward(*tensors)
        module._backward(*tensors, gathered, torch.ones_like(out))
    assert largest.numbers <= 2 * 500 * 4 < 500 * 20  # values


def test_the_operations_keep_torchs_rules_for_custom_ones():
    for needed in ([True] * 4, [False, True, False, True]):
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs(2, n=8), needed, strict=True)]
        opcheck(torch.ops.vltok.gaussian_mix, (*tensors, "auto"))


def test_it_compiles_as_one_graph():
    tensors = inputs(2)
    compiled = torch.compile(gaussian_mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gaussian_mix(*tensors))
