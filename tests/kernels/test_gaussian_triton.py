"""The Triton kernels against the definition: on a GPU if there is one, and always in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so that the interpreter needs a process of its own. One test starts
it; there the tests of `TestKernels` run on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import HAS_TRITON, IS_INTERPRETED, check_interpreted, needs_triton, outside
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from vltok.kernels import gaussian_mix as module
from vltok.kernels.gaussian import gaussian_kernel
from vltok.kernels.gaussian_mix import gaussian_mix

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
SIZES = [  # B, N, M, d, e
    (2, 37, 21, 5, 3),
    (1, 300, 9, 17, 33),  # many rows, few columns
    (2, 9, 700, 32, 40),  # and the reverse, where columns are split
    (1, 70, 70, 64, 16),
    (1, 20, 33, 256, 130),
    (3, 1, 1, 1, 1),
    (1, 1, 600, 2, 1),
]


@needs_triton
@outside
def test_the_kernels_agree_with_torch_in_the_interpreter():
    check_interpreted(f"{__file__}::TestKernels")


@needs_triton
@outside
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize(
    "outputs", [{"out_ptr"}, {"pull_ptr", "x_weight_ptr"}, {"out_ptr", "pull_ptr", "x_weight_ptr"}]
)
def test_the_kernel_compiles_where_blocks_differ_in_size(outputs, precision):
    """The compiler is stricter about types than the interpreter, and needs no GPU to check them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vltok.kernels.gaussian_triton import _sum_kernel

    names = _sum_kernel.arg_names
    types = dict.fromkeys(names, "constexpr") | dict.fromkeys(names[6:11], "i32")
    types |= dict.fromkeys({"x_ptr", "y_ptr", "y_weight_ptr"} | outputs, "*fp32")
    constants = dict.fromkeys(names[:6]) | dict(zip(names[11:], (5, 20, 16, 32, 32, 16, precision), strict=True))
    constants = {name: value for name, value in constants.items() if types[name] == "constexpr"}
    compile(ASTSource(_sum_kernel, types, constants), target=GPUTarget("cuda", 80, 32))


@needs_triton
@outside
def test_triton_on_cpu_tensors_is_an_error_without_the_interpreter():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        gaussian_mix(x, x, x, torch.ones(3, 3), backend="triton")


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="auto takes Triton on CUDA devices only")
def test_auto_takes_triton_on_a_gpu():
    x = torch.ones(1, 2, 3, device="cuda")
    assert module._implementation("auto", x, x, x).__name__ == "vltok.kernels.gaussian_triton"


def make(batch: int, n: int, m: int, d: int, e: int) -> list[torch.Tensor]:
    """Queries and landmarks whose kernel has large and small entries, values, W and a gradient, on the device."""
    rng = torch.Generator().manual_seed(n + 10 * m)
    sizes = ((batch, n, d), (batch, m, d), (batch, n, e), (batch, m, m), (batch, n, e))
    query, landmarks, values, weight, grad = (torch.randn(size, generator=rng) for size in sizes)
    scale = 1.2 * d**-0.5
    return [x.to(DEVICE) for x in (query * scale, landmarks * scale + 0.2 * scale, values, weight, grad)]


def run(tensors, grad, num_exact: int = 0, backend: str = "triton") -> list[torch.Tensor]:
    """What the operation gives, then all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = gaussian_mix(*leaves, num_exact, backend)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def expected(tensors, grad) -> list[torch.Tensor]:
    """The same by whole matrices in float64."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out = module.definition(*leaves)
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in leaves)]


def check_close(found, exact) -> None:
    """Equal to float32 rounding of the largest number, as sums that cancel are."""
    assert [x.shape for x in found] == [x.shape for x in exact]
    for i, (x, y) in enumerate(zip(found, exact, strict=True)):
        assert x.dtype == torch.float32
        error = ((x - y).abs().max() / y.abs().max()).item()
        assert error < 3e-6, f"result {i} is off by {error:.1e} of the largest number"


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor of floats that any operation returns; the interpreter also copies bytes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if torch.is_tensor(out) and out.is_floating_point() else 0)
        return out


class TestKernels:
    __test__ = HAS_TRITON and (IS_INTERPRETED or torch.cuda.is_available())

    @pytest.fixture(autouse=True)
    def triton_module(self, monkeypatch):
        """Sizes at which few numbers already make many programs and splits."""
        from vltok.kernels import gaussian_triton

        assert gaussian_triton.IS_INTERPRETED == IS_INTERPRETED
        monkeypatch.setattr(gaussian_triton, "SHORTEST", 40)
        return gaussian_triton

    @pytest.mark.parametrize("num_exact", [0, 1])
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_products_and_gradients_are_those_of_the_definition(self, sizes, num_exact):
        *tensors, grad = make(*sizes)
        check_close(run(tensors, grad, num_exact), expected(tensors, grad))

    def test_columns_are_split_only_where_rows_make_few_programs(self, triton_module, monkeypatch):
        parts = []
        monkeypatch.setattr(triton_module, "_added", lambda x: None if x is None else parts.append(x.shape[1]))
        for n, m, programs in ((9, 700, 1024), (9, 700, 4), (600, 100, 16), (9, 30, 1024)):
            a, b = (torch.randn(1, count, 3, device=DEVICE) for count in (n, m))
            monkeypatch.setattr(triton_module, "PROGRAMS", programs)
            triton_module._sums(a, b, None, b, weighted=True, pulled=False)
        assert parts == [11, 4, 1, 1]

    @pytest.mark.parametrize(("n", "m"), [(600, 50), (50, 600)])
    def test_no_tensor_has_as_many_numbers_as_the_kernel_matrix(self, n, m, triton_module):
        a, b = (torch.randn(1, count, 2, device=DEVICE) for count in (n, m))
        with Largest() as seen:
            triton_module.product(a, b, b)
            triton_module._sums(a, b, a, b, weighted=True, pulled=True)
        assert 2 * n <= seen.numel < n * m / 10

    def test_the_same_input_gives_the_same_bits(self):
        *tensors, grad = make(2, 9, 300, 5, 3)
        for x, y in zip(run(tensors, grad), run(tensors, grad), strict=True):
            assert torch.equal(x, y)

    def test_a_sample_alone_is_what_it_is_in_a_batch(self):
        *tensors, grad = make(3, 40, 90, 4, 4)
        together, alone = run(tensors, grad), run([x[1:2] for x in tensors], grad[1:2])
        check_close(alone, [x[1:2].double() for x in together])

    def test_tokens_in_any_memory_layout_give_the_same(self):
        *tensors, grad = make(2, 20, 9, 4, 3)
        exact = expected(tensors, grad)
        turned = [x.mT.contiguous().mT for x in (*tensors, grad)]
        check_close(run(turned[:-1], turned[-1], 1), exact)
        same = grad[:, :1].expand_as(grad)  # as the gradient of a sum is
        check_close(run(tensors, same), expected(tensors, same))

    @pytest.mark.parametrize("sizes", [(0, 3, 4, 2, 2), (2, 0, 4, 2, 2), (2, 3, 0, 2, 2), (2, 3, 4, 2, 0)], ids=str)
    def test_empty_tensors_give_empty_tensors_and_zeros(self, sizes):
        *tensors, grad = make(*sizes)
        for x, y in zip(run(tensors, grad), expected(tensors, grad), strict=True):
            assert torch.equal(x, y.float())

    def test_long_landmarks_are_exact(self):
        *tensors, grad = make(2, 12, 20, 3, 4)
        tensors[0][:, :2] += 2000
        tensors[1][:, -2:] = tensors[0][:, :2] + 0.5
        assert gaussian_kernel(*(x.double() for x in tensors[:2]))[:, :2, -2:].max() > 0.1
        check_close(run(tensors, grad, 2), expected(tensors, grad))

    def test_equal_tokens_far_from_the_origin_have_a_kernel_of_at_most_one(self, triton_module):
        # squares of 1e6 round to more than the distances, and either way
        a = torch.randn(1, 40, 7, device=DEVICE) * 1e-3 + 1000
        ones = torch.ones(1, 40, 1, device=DEVICE)
        assert (triton_module.product(a, a, ones) <= 40 * (1 + 1e-6)).all()

    def test_nan_in_is_nan_out(self, triton_module):
        a, b = torch.randn(1, 4, 3, device=DEVICE), torch.randn(1, 20, 3, device=DEVICE)
        a[0, 1] = float("nan")
        out = triton_module.product(a, b, b)
        assert out[0, 1].isnan().all() and out.isnan().sum() == 3

    def test_half_precision_and_leading_sizes(self):
        tensors = [x.unflatten(0, (2, 1)).bfloat16() for x in make(2, 20, 9, 4, 3)[:4]]
        out = gaussian_mix(*tensors, backend="triton")
        check_close([out], [module.definition(*(x.double() for x in tensors))])

    def test_the_operation_is_what_torch_expects_of_one(self):
        *tensors, grad = make(1, 6, 5, 3, 4)
        opcheck(torch.ops.vltok.gaussian_mix, (*(x.requires_grad_() for x in tensors), 1, "triton"))
        tensors = [x.detach() for x in tensors]
        _, gathered = torch.ops.vltok.gaussian_mix(*tensors, 1, "triton")
        opcheck(torch.ops.vltok.gaussian_mix_grad, (*tensors, gathered, grad, 1, "triton"))

    def test_what_the_kernels_cannot_take_is_refused(self):
        with pytest.raises(ValueError, match="at most 256 channels of tokens and of values, got 257"):
            gaussian_mix(*make(1, 3, 4, 2, 257)[:4], backend="triton")
        with pytest.raises(ValueError, match=r"computes in float32, got torch.float64; or use backend='torch'"):
            gaussian_mix(*(x.double() for x in make(1, 3, 4, 2, 2)[:4]), backend="triton")
