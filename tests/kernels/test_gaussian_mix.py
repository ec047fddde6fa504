"""gaussian_mix against whole kernel matrices in float64, in all ways that it may cut them into tiles."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vltok.kernels
from vltok.kernels import gaussian_mix as module
from vltok.kernels.gaussian_mix import gaussian_mix


def inputs(*batch: int, n: int = 37, m: int = 5, d: int = 3, e: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((n, d), (m, d), (n, e), (m, m))
    return [torch.randn(*batch, *shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]


def plain(query, landmarks, values, weight) -> torch.Tensor:
    kernel = torch.exp(-(query.unsqueeze(-2) - landmarks.unsqueeze(-3)).square().sum(-1) / 2)
    return kernel @ weight @ kernel.mT @ values


EXACT = pytest.mark.parametrize("num_exact", [0, 2])


def gradients(fn, tensors, cotangent) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(fn(*tensors), tensors, cotangent)


@EXACT
@pytest.mark.parametrize("tile", [1, 5, 64, 37 * 5, 2 * 37 * 5 + 3, 2**18])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_it_equals_whole_matrices_forward_and_backward(batch, tile, num_exact, monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE", tile)
    tensors = inputs(*batch)
    out, expected = gaussian_mix(*tensors, num_exact), plain(*tensors)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@EXACT
def test_derivatives_of_every_kind_are_those_of_finite_differences(num_exact):
    tensors = inputs(2, n=6, m=3)

    def mix(*tensors):
        return gaussian_mix(*tensors, num_exact)

    assert torch.autograd.gradcheck(mix, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mix, tensors)


def test_a_gradient_of_a_gradient_counts_no_path_twice():
    """Landmarks are made from queries, so that queries are reached directly and through the landmarks."""
    query, _, values, weight = inputs(2, n=6, m=3)

    def slope(fn, query):
        landmarks = query[:, :3].sin()
        (first,) = torch.autograd.grad(fn(query, landmarks, values, weight).square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), query)[0]

    def operation(*tensors):
        return torch.ops.vltok.gaussian_mix(*tensors, 0, "torch")[0]  # by itself: no view of what it is given

    torch.testing.assert_close(slope(operation, query), slope(plain, query))
    torch.testing.assert_close(slope(gaussian_mix, query), slope(plain, query))


@EXACT
def test_torch_func_sees_through_it(num_exact):
    tensors = [x.detach() for x in inputs(3, n=6, m=3)]
    tangents = [torch.randn_like(x) for x in tensors]

    def loss(fn):
        return lambda *tensors: fn(*tensors).square().sum()

    def mix(*tensors):
        return gaussian_mix(*tensors, num_exact)

    everything = tuple(range(4))
    calls = {
        "grad": lambda fn: torch.func.grad(loss(fn), everything)(*tensors),
        "jvp": lambda fn: torch.func.jvp(fn, tuple(tensors), tuple(tangents)),
        "vmap": lambda fn: torch.vmap(fn)(*tensors),
        "each sample's": lambda fn: torch.vmap(torch.func.grad(loss(fn), everything))(*tensors),
    }
    for name, call in calls.items():
        for found, expected in zip(call(mix), call(plain), strict=True):
            torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        found = forward_ad.unpack_dual(mix(*duals)).tangent
    torch.testing.assert_close(found, calls["jvp"](plain)[1])


def test_long_landmarks_are_exact_in_float32():
    """Their squares are 1e7, so that 1e-7 of them is as much as the distances."""
    tensors = inputs(2, n=12, m=5, dtype=torch.float32)
    with torch.no_grad():
        tensors[0][:, :2] += 2000
        tensors[1][:, 3:] = tensors[0][:, :2] + 0.5
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, expected = gaussian_mix(*tensors, 2), plain(*exact)
    assert expected[:, :2].abs().max() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert (gaussian_mix(*tensors) - expected).abs().max() > 1e-2, "without them it is off"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_float32_and_returns_gradients_in_the_dtype_of_the_inputs(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(2)]
    out = gaussian_mix(*tensors)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), plain(*(x.double() for x in tensors)), rtol=1e-5, atol=1e-5)
    assert {x.dtype for x in torch.autograd.grad(out.sum(), tensors)} == {dtype}


@pytest.mark.parametrize("sizes", [{"n": 0}, {"m": 2}, {"d": 0}, {"e": 0}, {"n": 0, "m": 2}], ids=str)
@pytest.mark.parametrize("batch", [(0,), (2, 0), (2,)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empty_tensors_give_sums_of_nothing_and_meta_tensors_shapes(sizes, batch, device):
    tensors = [x.detach().to(device).requires_grad_() for x in inputs(*batch, **sizes)]
    out = gaussian_mix(*tensors, 2)
    assert (out.shape, out.device.type) == (tensors[2].shape, device)
    if device == "cpu":
        torch.testing.assert_close(out, plain(*tensors))
    assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]


def test_nan_in_is_nan_out():
    tensors = [x.detach() for x in inputs(2)]
    tensors[0][0, 3] = torch.nan
    out = gaussian_mix(*tensors)
    assert out[0].isnan().all() and out[1].isfinite().all()


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
    monkeypatch.setattr(module, "CPU_TILE", 100)
    tensors = [x.detach() for x in inputs(2, n=500, m=20)]
    with Largest() as largest:
        columns = tensors[0].new_empty(2, 500, 0)
        out, gathered = module.forward(*tensors, columns)
        module.backward(*tensors, columns, gathered, torch.ones_like(out))
    assert largest.numbers <= 2 * 500 * 4 < 500 * 20  # values


@EXACT
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one of heads"])
def test_the_operations_keep_torchs_rules_for_custom_ones(layout, num_exact):
    """Strides among them: what is compiled relies on those that are promised."""
    for needed in ([True] * 4, [False, True, False, True]):
        tensors = [x.detach() for x in inputs(1 if layout == "one of heads" else 2, n=8)]
        if layout == "transposed":
            tensors = [x.mT.contiguous().mT for x in tensors]
        elif layout == "one of heads":
            tensors = [torch.stack([x, x], 2).unbind(2)[0] for x in tensors]
        tensors = [x.requires_grad_(wanted) for x, wanted in zip(tensors, needed, strict=True)]
        opcheck(torch.ops.vltok.gaussian_mix, (*tensors, num_exact, "auto"))
        tensors = [x.detach() for x in tensors]
        out, gathered = torch.ops.vltok.gaussian_mix(*tensors, num_exact, "auto")
        opcheck(torch.ops.vltok.gaussian_mix_grad, (*tensors, gathered, torch.ones_like(out), num_exact, "auto"))


def test_it_compiles_as_one_graph_for_all_sizes():
    compiled = torch.compile(gaussian_mix, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, n, m in ((2, 37, 5), (3, 20, 7), (4, 11, 4)):
        tensors = inputs(batch, n=n, m=m)
        torch.testing.assert_close(compiled(*tensors, 1), gaussian_mix(*tensors, 1))
        cotangent = torch.ones_like(tensors[2])
        for pair in zip(*(gradients(fn, tensors, cotangent) for fn in (compiled, gaussian_mix)), strict=True):
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
        ({"query": torch.ones(2, 8, 3).long()}, TypeError, "query must be a tensor of a float dtype, got torch.int64"),
        ({"values": [1.0]}, TypeError, "values must be a tensor of a float dtype, got list"),
        ({"landmarks": torch.ones(2, 5, 4)}, ValueError, "query and landmarks must be .* same leading sizes and d"),
        (
            {"values": torch.ones(2, 7, 4)},
            ValueError,
            r"values must be \(..., N, e\) .* got \(2, 7, 4\) and \(2, 5, 5\)",
        ),
        ({"weight": torch.ones(2, 5, 4)}, ValueError, r"weight \(..., M, M\) .* got \(2, 8, 4\) and \(2, 5, 4\)"),
        (
            {"weight": torch.ones(2, 5, 5, device="meta")},
            ValueError,
            "on one device, got query on cpu and weight on meta",
        ),
        ({"num_exact": 6}, ValueError, "num_exact must be at most 5, the tokens of landmarks; got 6"),
    ],
)
def test_wrong_input_is_refused(change, error, message):
    names = ("query", "landmarks", "values", "weight")
    tensors = dict(zip(names, (x.detach() for x in inputs(2, n=8)), strict=True))
    with pytest.raises(error, match=message):
        gaussian_mix(**(tensors | change))


# Which backend runs


def like(device: str = "cuda", dtype: torch.dtype = torch.float32, width: int = 8) -> SimpleNamespace:
    """What the choice of a backend looks at, of a tensor that may be on a device this machine lacks."""
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, shape=(1, 2, width), numel=torch.empty(1, 2, width).numel
    )


def chosen(backend: str, query: SimpleNamespace, values: SimpleNamespace | None = None) -> ModuleType:
    return module._implementation(backend, query, query, values or query)


@pytest.fixture
def twin(monkeypatch) -> ModuleType:
    """Stands in for the Triton module, which may not be installed."""
    fake = ModuleType("vltok.kernels.gaussian_triton")
    fake.IS_INTERPRETED = False
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(vltok.kernels, "gaussian_triton", fake, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return fake


@pytest.fixture
def no_triton(twin, monkeypatch):
    monkeypatch.delattr(vltok.kernels, "gaussian_triton")
    monkeypatch.delitem(sys.modules, twin.__name__)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_auto_takes_triton_where_it_can_run(twin):
    assert chosen("auto", like()) is twin
    assert chosen("triton", like(), like(width=module.WIDEST)) is twin
    assert chosen("torch", like()) is module
    assert chosen("triton", like(), like(width=0)) is module, "there is nothing to launch"


@pytest.mark.parametrize(
    ("query", "values", "message"),
    [
        (like("cpu"), like("cpu"), "needs CUDA tensors, or TRITON_INTERPRET=1 .* got cpu; or use backend='torch'"),
        (like("mps"), like("mps"), "got mps"),
        (like(dtype=torch.float64), like(dtype=torch.float64), "computes in float32, got torch.float64"),
        (like(width=257), like(), "at most 256 channels of tokens and of values, got 257"),
        (like(), like(width=300), "got 300; or use backend='torch'"),
    ],
)
def test_where_triton_cannot_run_auto_takes_torch_and_asking_for_it_is_an_error(query, values, message, twin):
    assert chosen("auto", query, values) is module
    with pytest.raises(ValueError, match=message):
        chosen("triton", query, values)


def test_the_interpreter_must_be_asked_for_before_triton_is_loaded(twin, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        chosen("triton", like("cpu"))
    twin.IS_INTERPRETED = True
    assert chosen("triton", like("cpu")) is twin
    assert chosen("auto", like("cpu")) is module


def test_without_triton_auto_takes_torch_and_asking_for_it_says_what_to_install(no_triton):
    assert chosen("auto", like()) is module
    with pytest.raises(ImportError, match="pip install triton"):
        chosen("triton", like())
