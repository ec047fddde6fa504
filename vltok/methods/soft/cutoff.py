"""How SOFT-Norm's pseudo-inverse cuts off small eigenvalues, and how it changes with its matrix.

What 20 exact Newton steps make of an eigenvalue e is f(e) = (1 - (1 - alpha e^2)^(2^20)) / e, with alpha = 1.8 / s^2
and s the largest row sum: 1 / e far above 1e-3 s, and about 0 far below.
"""

from __future__ import annotations

import torch

from vltok.errors import UnsupportedInputError

START = 1.8  # of 2, from where on Newton's iteration diverges
STEPS = 20  # of the paper; 2^20 is also what the float64 solution cuts small eigenvalues off by
EQUAL = 1e-6  # of the largest row sum: eigenvalues nearer to each other have the quotient of differences rounded
WHOLE = 1e-5  # of an inverse: where less is cut off, derivatives of the exact one hold to 1e-3


def cut_inverse(kernel: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of symmetric matrices, (..., M, M), float64."""
    values, vectors = torch.linalg.eigh(kernel)
    inverse, _, _ = _cut(values, kernel.sum(-1).amax(-1, keepdim=True))
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def _cut(values: torch.Tensor, row_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues of the inverse, f(e), and derivatives of f by e and by alpha, each (..., M); row_sum: (..., 1)."""
    alpha, power = START / row_sum**2, 2.0**STEPS
    share = alpha * values**2
    small = share.clamp(max=0.5)
    left = power * torch.where(share < 0.5, torch.log1p(-small), torch.log((1 - share).abs()))  # its logarithm
    is_zero = values.abs() < 1e-9 * row_sum  # where the next digit is 1e-12 of the first
    ratio = torch.where(is_zero, alpha * power, -torch.expm1(left) / torch.where(is_zero, 1, values) ** 2)
    inverse, left = ratio * values, left.exp()
    steep = torch.where(left > 0, power * left / torch.where(left > 0, 1 - share, 1), 0)  # -d left / d share
    return inverse, 2 * alpha * steep - ratio, values * steep


def cut_change(kernel: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The derivative of `cut_inverse` at symmetric matrices, in the direction of a symmetric change, both (..., M, M).

    In the basis of eigenvectors the change is multiplied by the quotients (f(e_i) - f(e_j)) / (e_i - e_j) (Daleckii and
    Krein), and f itself moves with alpha. Linear in `change`. Computes in float64.
    """
    dtype, kernel, change = change.dtype, kernel.double(), change.double()
    row_sum, row = kernel.sum(-1).max(-1, keepdim=True)  # (..., 1)
    values, vectors = torch.linalg.eigh(kernel)
    inverse, slope, by_alpha = _cut(values, row_sum)
    gap = values.unsqueeze(-1) - values.unsqueeze(-2)
    is_equal = gap.abs() < EQUAL * row_sum.unsqueeze(-1)
    slopes = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
    quotients = (inverse.unsqueeze(-1) - inverse.unsqueeze(-2)) / torch.where(is_equal, 1, gap)
    inner = torch.where(is_equal, slopes, quotients) * (vectors.mT @ change @ vectors)
    alpha_change = -2 * START / row_sum**3 * change.sum(-1).gather(-1, row)
    return (vectors @ (inner + torch.diag_embed(by_alpha * alpha_change)) @ vectors.mT).to(dtype)


class OnceDifferentiable(torch.autograd.Function):
    """A pseudo-inverse inside its own gradient, which follows the cut-off forward, but not backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return inverse.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        (kernel,) = ctx.saved_tensors
        values = torch.linalg.eigvalsh(kernel.double())
        inverse, _, _ = _cut(values, kernel.double().sum(-1).amax(-1, keepdim=True))
        if not ((1 - values * inverse).abs() < WHOLE).all():
            raise UnsupportedInputError(
                "SOFT-Norm has no second derivatives by a backward pass here: landmarks so near to each other that the "
                "pseudo-inverse of their kernel is cut off; use forward-mode over reverse-mode (torch.func.jvp of "
                "torch.func.grad), normalize=False, or no gradient of a gradient"
            )
        return None, grad

    @staticmethod
    def jvp(ctx, _, inverse_tangent: torch.Tensor) -> torch.Tensor:
        return inverse_tangent.clone()
