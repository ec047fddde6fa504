"""The Gaussian kernel against loops in float64, also where tokens are so long that squares round to nothing useful."""

from __future__ import annotations

import pytest
import torch

from vltok.kernels.gaussian import exact_columns, gaussian_kernel

SHAPES = [(13, 5, 3), (5, 13, 4), (7, 7, 1), (1, 1, 2), (1, 9, 3), (9, 1, 3)]  # N, M, d


def plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernel entry by entry, from differences, in float64."""
    if a.dim() > 2:
        return torch.stack([plain(x, y) for x, y in zip(a, b, strict=True)])
    a, b = a.double(), b.double()
    return torch.stack([torch.stack([(-0.5 * (x - y).square().sum()).exp() for y in b]) for x in a])


def make(n: int, m: int, d: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Tokens whose kernel has large and small entries, (3, N, d) and (3, M, d)."""
    rng = torch.Generator().manual_seed(n + 10 * m)
    a, b = (torch.randn(3, count, d, generator=rng, dtype=torch.float64) * 1.2 * d**-0.5 for count in (n, m))
    return [x.to(dtype) for x in (a, b + 0.2)]


def gradients(fn, tensors, grad) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return list(torch.autograd.grad(fn(*leaves), leaves, grad))


@pytest.mark.parametrize("num_exact", [0, 1])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_the_kernel_is_the_loops(n, m, d, num_exact):
    a, b = make(n, m, d)
    found = gaussian_kernel(a, b, num_exact)
    torch.testing.assert_close(found, plain(a, b), rtol=1e-12, atol=1e-14)
    weight = torch.linspace(-1, 2, 3 * n * m, dtype=a.dtype).view(3, n, m)
    pairs = (gradients(fn, (a, b), weight) for fn in (lambda x, y: gaussian_kernel(x, y, num_exact), plain))
    for mine, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_exact", [0, 2, 6])
def test_the_kernel_of_tokens_with_themselves_has_ones_on_its_diagonal(num_exact):
    a = make(6, 6, 50, torch.float32)[0] + 100  # where squares round to more than their differences
    kernel = gaussian_kernel(a, num_exact=num_exact)
    assert torch.equal(kernel.diagonal(dim1=1, dim2=2), torch.ones(3, 6))
    own = make(6, 6, 3)[0]
    torch.testing.assert_close(gaussian_kernel(own, num_exact=num_exact), plain(own, own), rtol=1e-12, atol=1e-14)
    weight = torch.ones(3, 6, 6).double().triu()
    [grad] = gradients(lambda x: gaussian_kernel(x, num_exact=num_exact), [own], weight)
    [expected] = gradients(lambda x: plain(x, x), [own], weight)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_exact_columns_and_rows_hold_for_long_tokens_in_float32():
    a, b = make(20, 5, 8, torch.float32)
    a[:, -2:], b[:, -2:] = a[:, -2:] + 3000, a[:, -2:] + 3000.25  # two of each far out, near to each other
    expected = plain(a, b)
    assert expected[:, -2:, -2:].min() > 0.1
    torch.testing.assert_close(gaussian_kernel(a, b, 2).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact_columns(a, b[:, -2:]).double(), expected[..., -2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gaussian_kernel(a, num_exact=2).double(), plain(a, a), rtol=1e-5, atol=1e-6)
    assert (gaussian_kernel(a, b) - expected).abs().max() > 0.1, "without them it is off"


def test_far_and_equal_tokens_give_finite_numbers_in_0_to_1():
    a, b = make(8, 8, 3, torch.float32)
    for scale, shift in ((1e4, 0), (0, 1e4), (1e-3, 1e4), (0, 0)):
        for num_exact in (0, 3):
            kernel = gaussian_kernel(a * scale + shift, b.flip(1) * scale + shift, num_exact)
            assert kernel.min() >= 0 and kernel.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_float32_also_under_autocast(dtype):
    a, b = make(9, 6, 8, dtype)
    kernel = gaussian_kernel(a, b)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel.double(), plain(a, b), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_kernel(a, b), kernel)


def test_one_float64_input_makes_it_float64():
    a, b = make(4, 3, 2)
    assert gaussian_kernel(a.float(), b).dtype == gaussian_kernel(a, b.float()).dtype == torch.float64


def test_gradients_of_every_kind_are_finite_differences():
    a, b = (x[:2].requires_grad_() for x in make(4, 3, 2))
    for num_exact in (0, 2):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, y, count=num_exact: gaussian_kernel(x, y, count), (a, b))
        assert torch.autograd.gradcheck(
            lambda x, y, c=num_exact: gaussian_kernel(x, y, c), (a, b), check_forward_ad=True
        )


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sets_have_empty_kernels(n, m):
    a, b = make(n, m, 2)
    assert gaussian_kernel(a, b).shape == (3, n, m)
    assert gaussian_kernel(a[:0], b[:0]).shape == (0, n, m)
    assert gaussian_kernel(a.to("meta"), b.to("meta"), m).shape == (3, n, m)


OK = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((OK.long(), OK), TypeError, "a must be a tensor of a float dtype, got torch.int64"),
        (([1.0],), TypeError, "a must be a tensor of a float dtype, got list"),
        ((OK, torch.ones(4)), ValueError, r"b must be \(..., tokens, channels\), got \(4,\)"),
        ((OK, OK[..., :3]), ValueError, r"same leading sizes and d, got \(2, 3, 4\) and \(2, 3, 3\)"),
        ((OK, OK[:1]), ValueError, "same leading sizes"),
        ((OK, OK.to("meta")), ValueError, "on one device, got a on cpu and b on meta"),
        ((OK, OK, 4), ValueError, "num_exact must be at most 3, the tokens of b; got 4"),
        ((OK, OK, -1), ValueError, "num_exact must be at least 0, got -1"),
        ((OK, OK, True), TypeError, "num_exact must be an integer"),
    ],
)
def test_wrong_input_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        gaussian_kernel(*args)
