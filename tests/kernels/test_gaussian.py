"""Gaussian kernels and their products against loops in float64, and what the operation promises beside numbers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vltok.kernels
from vltok.kernels import gaussian
from vltok.kernels.gaussian import gaussian_kernel, gaussian_product

SHAPES = [(13, 5, 3, 4), (5, 13, 4, 3), (7, 7, 1, 1), (1, 1, 2, 2), (1, 9, 3, 2), (9, 1, 3, 2)]  # N, M, d, e
TILES = [1, 7, 64, 140, 2**17]  # one number, one row, part of a matrix, two of the samples, everything


def plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernel entry by entry, from differences, in float64."""
    if a.dim() > 2:
        return torch.stack([plain(x, y) for x, y in zip(a, b, strict=True)])
    a, b = a.double(), b.double()
    return torch.stack([torch.stack([(-0.5 * (x - y).square().sum()).exp() for y in b]) for x in a])


def make(n: int, m: int, d: int, e: int, batch=(3,), dtype=torch.float64) -> list[torch.Tensor]:
    """Tokens whose kernel has large and small entries, values and a gradient of the product."""
    rng = torch.Generator().manual_seed(n + 10 * m)
    a, b, values, grad = (
        torch.randn(*batch, *size, generator=rng, dtype=torch.float64) for size in ((n, d), (m, d), (m, e), (n, e))
    )
    scale = 1.2 * d**-0.5
    return [x.to(dtype) for x in (a * scale, b * scale + 0.2, values, grad)]


def gradients(fn, tensors, grad) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return list(torch.autograd.grad(fn(*leaves), leaves, grad))


def plain_product(a, b, values):
    return plain(a, b) @ values.double()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
        return out


@pytest.mark.parametrize(("n", "m", "d", "e"), SHAPES)
def test_the_kernel_is_the_loops(n, m, d, e):
    a, b, _, _ = make(n, m, d, e)
    torch.testing.assert_close(gaussian_kernel(a, b), plain(a, b), rtol=1e-12, atol=1e-14)
    weight = torch.linspace(-1, 2, 3 * n * m, dtype=a.dtype).view(3, n, m)
    for found, expected in zip(
        gradients(gaussian_kernel, (a, b), weight), gradients(plain, (a, b), weight), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_the_kernel_of_tokens_with_themselves_has_ones_on_its_diagonal():
    a = make(6, 6, 50, 1, dtype=torch.float32)[0] + 100  # where squares round to more than their differences
    kernel = gaussian_kernel(a)
    assert torch.equal(kernel.diagonal(dim1=1, dim2=2), torch.ones(3, 6))
    own = make(6, 6, 3, 1)[0]
    torch.testing.assert_close(gaussian_kernel(own), plain(own, own), rtol=1e-12, atol=1e-14)
    [grad] = gradients(lambda x: gaussian_kernel(x), [own], torch.ones(3, 6, 6).double().triu())
    [expected] = gradients(lambda x: plain(x, x), [own], torch.ones(3, 6, 6).double().triu())
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize(("n", "m", "d", "e"), SHAPES)
def test_product_and_gradients_are_the_loops_whatever_the_tiles(n, m, d, e, size, monkeypatch):
    monkeypatch.setattr(gaussian, "CPU_TILE", size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    a, b, values, grad = make(n, m, d, e)
    torch.testing.assert_close(gaussian_product(a, b, values), plain_product(a, b, values), rtol=1e-12, atol=1e-14)
    found, expected = (gradients(fn, (a, b, values), grad) for fn in (gaussian_product, plain_product))
    for name, x, y in zip(["a", "b", "values"], found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_gradient_alone_is_what_it_is_with_the_others(wanted):
    *tensors, grad = make(8, 5, 3, 4)
    everything = gradients(gaussian_product, tensors, grad)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    gaussian_product(*leaves).backward(grad)
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, everything[i], rtol=1e-13, atol=1e-14)
        else:
            assert leaf.grad is None


def test_gradients_are_finite_differences(monkeypatch):
    monkeypatch.setattr(gaussian, "CPU_TILE", 8)
    a, b, values, _ = (x.requires_grad_() for x in make(5, 4, 2, 3, batch=(2,)))
    assert torch.autograd.gradcheck(gaussian_product, (a, b, values))
    assert torch.autograd.gradcheck(gaussian_kernel, (a, b))
    assert torch.autograd.gradcheck(gaussian_kernel, (a,))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2), (0,), (2, 0)])
def test_leading_sizes_are_kept(batch):
    a, b, values, grad = make(4, 6, 3, 2, batch=batch)
    out = gaussian_product(a, b, values)
    assert out.shape == (*batch, 4, 2)
    torch.testing.assert_close(out, gaussian_kernel(a, b) @ values, rtol=1e-12, atol=1e-14)
    assert [x.shape for x in gradients(gaussian_product, (a, b, values), grad)] == [a.shape, b.shape, values.shape]


@pytest.mark.parametrize(("n", "m", "d", "e"), [(0, 3, 2, 2), (3, 0, 2, 2), (0, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0)])
def test_empty_tensors_give_sums_of_nothing(n, m, d, e):
    a, b, values, grad = make(n, m, d or 1, e)
    a, b = a[..., :d], b[..., :d]
    expected = values.sum(1, keepdim=True).expand(3, n, e) if d == 0 else a.new_zeros(3, n, e)
    torch.testing.assert_close(gaussian_product(a, b, values), expected, rtol=1e-12, atol=1e-14)
    assert [x.shape for x in gradients(gaussian_product, (a, b, values), grad)] == [a.shape, b.shape, values.shape]


def test_tokens_in_any_memory_layout_give_the_same():
    a, b, values, grad = make(6, 5, 4, 3)
    expected = gaussian_product(a, b, values), gradients(gaussian_product, (a, b, values), grad)
    strided = [x.mT.contiguous().mT for x in (a, b, values)]
    torch.testing.assert_close(gaussian_product(*strided), expected[0], rtol=1e-13, atol=1e-14)
    leaves = [x.requires_grad_() for x in strided]
    found = torch.autograd.grad(gaussian_product(*leaves), leaves, grad.mT.contiguous().mT)
    for x, y in zip(found, expected[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_and_returns_gradients_in_the_dtype_of_the_inputs(dtype):
    a, b, values, grad = make(9, 6, 3, 4, dtype=dtype)
    out = gaussian_product(a, b, values)
    assert out.dtype == gaussian_kernel(a, b).dtype == torch.float32
    torch.testing.assert_close(out.double(), plain_product(a, b, values), rtol=1e-5, atol=1e-6)
    found = gradients(gaussian_product, (a, b, values), grad.float())
    assert {x.dtype for x in found} == {dtype}
    expected = gradients(plain_product, [x.double() for x in (a, b, values)], grad.double())
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-5)


def test_one_float64_input_makes_it_all_float64():
    a, b, values, _ = make(4, 3, 2, 2)
    assert gaussian_product(a.float(), b.float(), values).dtype == gaussian_kernel(a.float(), b).dtype == torch.float64


def test_autocast_does_not_reach_inside():
    *tensors, grad = make(9, 6, 8, 8, dtype=torch.float32)
    expected = gaussian_product(*tensors), gaussian_kernel(*tensors[:2])
    expected_grads = gradients(gaussian_product, tensors, grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_product(*tensors), expected[0])
        assert torch.equal(gaussian_kernel(*tensors[:2]), expected[1])
        for x, y in zip(gradients(gaussian_product, tensors, grad), expected_grads, strict=True):
            assert torch.equal(x, y)


def test_compiles_in_one_graph():
    def loss(a, b, values):
        return (gaussian_product(2 * a, b, values) * gaussian_kernel(a, b).sum(-1, keepdim=True)).sin()

    *tensors, grad = make(7, 5, 3, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors), rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(compiled, tensors, grad), gradients(loss, tensors, grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_operations_are_what_torch_expects_of_one(layout):
    *tensors, grad = make(6, 5, 3, 4, dtype=torch.float32)
    if layout == "transposed":
        *tensors, grad = (x.mT.contiguous().mT for x in (*tensors, grad))
    for leaf in tensors:
        leaf.requires_grad_()
    opcheck(gaussian._product, (*tensors, "torch"))
    tensors = [x.detach() for x in tensors]
    for needed in ([True, True, True], [False, True, False], [True, False, True]):
        opcheck(gaussian._product_grad, (*tensors, grad, needed, "torch"))


@pytest.mark.parametrize(("n", "m"), [(3000, 40), (40, 3000), (300, 300)])
def test_no_tensor_has_as_many_numbers_as_the_kernel_matrix(n, m, monkeypatch):
    monkeypatch.setattr(gaussian, "CPU_TILE", 2**10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    a, b, values, grad = make(n, m, 3, 4, batch=(2,))
    with Largest() as seen:
        gaussian.apply(a, b, values)
        gaussian.grad(a, b, values, grad, [True, True, True])
    inputs = 2 * max(n, m) * 5  # tokens and the two channels they are given
    assert max(x.numel() for x in (a, b, values, grad)) <= seen.numel <= max(inputs, 2**10) < n * m


def test_far_and_equal_tokens_give_finite_numbers_in_0_to_1():
    *tensors, grad = make(8, 8, 3, 2, dtype=torch.float32)
    for scale, shift in ((1e4, 0), (0, 1e4), (1e-3, 1e4), (0, 0)):
        a, b, values = tensors[0] * scale + shift, tensors[0].flip(1) * scale + shift, tensors[2].abs()
        kernel = gaussian_kernel(a, b)
        assert kernel.min() >= 0 and kernel.max() <= 1
        assert (gaussian_product(a, b, values) <= values.sum(1, keepdim=True) * (1 + 1e-6)).all()
        assert all(x.isfinite().all() for x in gradients(gaussian_product, (a, b, values), grad))
    alike = torch.full((1, 4, 3), 123.456)
    torch.testing.assert_close(gaussian_product(alike, alike, torch.ones(1, 4, 2)), torch.full((1, 4, 2), 4.0))


def test_nan_in_is_nan_out():
    a, b, values, _ = make(4, 3, 2, 2)
    a[0, 1] = float("nan")
    out = gaussian_product(a, b, values)
    assert out[0, 1].isnan().all() and out.isnan().sum() == 2


OK = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((OK, OK, OK, "cuda"), ValueError, "one of auto, torch, triton, got 'cuda'"),
        ((OK.long(), OK, OK), TypeError, "a must be a tensor of a float dtype, got torch.int64"),
        ((OK, OK, [1.0]), TypeError, "values must be a tensor of a float dtype, got list"),
        ((OK, torch.ones(4), OK), ValueError, r"b must be \(..., tokens, channels\), got \(4,\)"),
        ((OK, OK[..., :3], OK), ValueError, r"same leading sizes and d, got a \(2, 3, 4\), b \(2, 3, 3\)"),
        ((OK, OK[:1], OK[:1]), ValueError, "same leading sizes"),
        ((OK, OK, OK[:, :2]), ValueError, "one row for each of b"),
        ((OK, OK, OK.to("meta")), ValueError, "on one device, got .* values on meta"),
    ],
)
def test_wrong_input_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        gaussian_product(*args)


def test_a_wrong_input_of_the_kernel_is_refused():
    with pytest.raises(ValueError, match="same leading sizes and d"):
        gaussian_kernel(OK, OK[..., :2])
    with pytest.raises(TypeError, match="a must be a tensor"):
        gaussian_kernel([1.0])


def like(device: str = "cuda", dtype: torch.dtype = torch.float32, width: int = 8) -> SimpleNamespace:
    """What the choice of a backend looks at, of a tensor that may be on a device this machine lacks."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, width))


@pytest.fixture
def twin(monkeypatch) -> ModuleType:
    """Stands in for the Triton module, which may not be installed."""
    module = ModuleType("vltok.kernels.gaussian_triton")
    module.IS_INTERPRETED = False
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vltok.kernels, "gaussian_triton", module, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return module


@pytest.fixture
def no_triton(twin, monkeypatch):
    monkeypatch.delattr(vltok.kernels, "gaussian_triton")
    monkeypatch.delitem(sys.modules, twin.__name__)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_auto_takes_triton_where_it_can_run(twin):
    assert gaussian._implementation("auto", like(), like()) is twin
    assert gaussian._implementation("triton", like(), like(width=gaussian.WIDEST)) is twin
    assert gaussian._implementation("torch", like(), like()) is gaussian


@pytest.mark.parametrize(
    ("a", "values", "message"),
    [
        (like("cpu"), like("cpu"), "needs CUDA tensors, or TRITON_INTERPRET=1 .* got cpu; or use backend='torch'"),
        (like("mps"), like("mps"), "got mps"),
        (like(dtype=torch.float64), like(dtype=torch.float64), "computes in float32, got torch.float64"),
        (like(width=257), like(), "at most 256 channels of tokens and of values, got 257"),
        (like(), like(width=300), "got 300; or use backend='torch'"),
    ],
)
def test_where_triton_cannot_run_auto_takes_torch_and_asking_for_it_is_an_error(a, values, message, twin):
    assert gaussian._implementation("auto", a, values) is gaussian
    with pytest.raises(ValueError, match=message):
        gaussian._implementation("triton", a, values)


def test_the_interpreter_must_be_asked_for_before_triton_is_loaded(twin, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        gaussian._implementation("triton", like("cpu"), like("cpu"))
    twin.IS_INTERPRETED = True
    assert gaussian._implementation("triton", like("cpu"), like("cpu")) is twin
    assert gaussian._implementation("auto", like("cpu"), like("cpu")) is gaussian


def test_without_triton_auto_takes_torch_and_asking_for_it_says_what_to_install(no_triton):
    assert gaussian._implementation("auto", like(), like()) is gaussian
    with pytest.raises(ImportError, match="pip install triton"):
        gaussian._implementation("triton", like(), like())
