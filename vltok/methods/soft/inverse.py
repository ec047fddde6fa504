"""The inverse of a kernel matrix of landmarks, by Newton's iteration and with a proof that it is one.

Paper: https://arxiv.org/abs/2110.11945 (SOFT). Differs from the released code: each matrix starts on its own, its
residual is measured, and where twenty steps were not enough it is solved in float64 instead of being used as it is; on
the CPU it always is. `released_inverse` is what the released code computes, for its checkpoints.
"""

from __future__ import annotations

import torch

from vltok.kernels.transforms import is_transformed
from vltok.methods.soft.cutoff import START, STEPS, OnceDifferentiable, cut_change, cut_inverse

RIDGE = 0.01  # added to the diagonal in the variant that is not normalised
TOLERANCE = 1e-4  # of I - P V
PSEUDO_TOLERANCE = 1e-3  # of P V P - P; STEPS exact steps leave at most 3.2e-4


def kernel_inverse(kernel: torch.Tensor, newton_iters: int = STEPS, ridge: float = RIDGE) -> torch.Tensor:
    """Invert kernel matrices, each independently of the others.

    With a ridge the result is the inverse of `kernel + ridge I`. Without one it is the pseudo-inverse, cut off
    smoothly: an eigenvalue far above 1e-3 times the largest row sum is inverted, one far below is taken for 0. On GPUs
    both come from Newton's iteration, and matrices that it leaves with a residual above `TOLERANCE` (or
    `PSEUDO_TOLERANCE`) are solved in float64. On the CPU all are, which takes less time there.

    Gradients are those of the exact inverse, dP = -Y^T G Y^T; they take what was cut off for 0, too. Forward-mode
    derivatives also follow the cut-off as it moves. Gradients of gradients are right where nothing is cut off, and
    refused elsewhere.

    Args:
        kernel: Symmetric matrices with entries in [0, 1] and ones on the diagonal, (..., M, M), float32 or float64.
        newton_iters: Newton steps, at least 1; without a ridge, at most `STEPS` are made.
        ridge: What to add to the diagonal, at least 0.

    Returns:
        The inverses, (..., M, M), in the dtype of `kernel`. NaN where the kernel has NaN.
    """
    return _inverse(kernel, newton_iters, ridge, True)


def released_inverse(kernel: torch.Tensor, newton_iters: int = STEPS, ridge: float = RIDGE) -> torch.Tensor:
    """Compute what the released code does, converged or not.

    Without a ridge all matrices start from one number, so that a result depends on what else is in the batch, and
    gradients go through the iteration.

    Args:
        kernel: As for `kernel_inverse`.
        newton_iters: Newton steps.
        ridge: What to add to the diagonal; 0 selects the released start of the normalised variant.

    Returns:
        About the inverses, (..., M, M).
    """
    if ridge > 0:
        return _inverse(kernel, newton_iters, ridge, False)
    if 0 in kernel.shape:
        return kernel.clone()  # the largest row sum of none doesn't exist
    alpha = 2 / kernel.sum(-1).amax() ** 2
    with torch.no_grad():  # the largest of ten halvings that starts inside the region of convergence, or the last
        product, one = kernel @ kernel, torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        norms = [(one - alpha * 0.5**halvings * product).abs().sum(-2).amax() for halvings in range(10)]
        halvings = (torch.stack(norms) > 1.01).to(kernel.dtype).cumprod(0).sum()
    inverse = alpha * 0.5**halvings * kernel
    for _ in range(newton_iters):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


def _inverse(kernel: torch.Tensor, newton_iters: int, ridge: float, check: bool) -> torch.Tensor:
    if is_transformed(kernel):
        return _Transformed.apply(kernel, newton_iters, ridge, check)
    return _kernel_inverse(kernel, newton_iters, ridge, check)


@torch.library.custom_op("vltok::kernel_inverse", mutates_args=())
def _kernel_inverse(kernel: torch.Tensor, newton_iters: int, ridge: float, check: bool) -> torch.Tensor:
    """Opaque to torch.compile, as how long a solution takes depends on the data."""
    flat = kernel.reshape(-1, *kernel.shape[-2:])
    if not check:
        inverse = _newton(flat, newton_iters, ridge)
    elif _is_direct(flat):
        inverse = _solve_finite(flat, ridge)
    else:
        inverse = _checked_newton(flat, newton_iters, ridge)
    return inverse.reshape(kernel.shape)


def _is_direct(kernel: torch.Tensor) -> bool:
    """Whether factorising takes less time than Newton's iteration."""
    return kernel.device.type == "cpu"


def _checked_newton(kernel: torch.Tensor, newton_iters: int, ridge: float) -> torch.Tensor:
    """Newton's iteration, and a direct solution where its residual says that it is not one."""
    matrix = kernel
    if ridge == 0:
        # Each step doubles what rounding leaves in directions that are cut off, and would cut off less.
        matrix, newton_iters = kernel.double(), min(newton_iters, STEPS)
    inverse = _newton(matrix, newton_iters, ridge)
    if inverse.numel():
        one = torch.eye(kernel.shape[-1], dtype=matrix.dtype, device=kernel.device)
        if ridge > 0:
            residual, tolerance = one - (matrix + ridge * one) @ inverse, TOLERANCE
        else:
            residual, tolerance = matrix @ inverse @ matrix - matrix, PSEUDO_TOLERANCE * kernel.sum(-1).amax(-1)
        bad = (~(residual.abs().flatten(1).amax(1) <= tolerance)).nonzero().squeeze(-1)
        if bad.numel():
            inverse[bad] = _solve_finite(kernel[bad], ridge).to(inverse.dtype)
    return inverse.to(kernel.dtype)


def _solve_finite(kernel: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solve directly, in float64, what is finite; NaN for the rest."""
    finite = kernel.isfinite().flatten(1).all(1)
    if finite.all():
        return _solve(kernel.double(), ridge).to(kernel.dtype)
    inverse = torch.full_like(kernel, torch.nan)
    inverse[finite] = _solve(kernel[finite].double(), ridge).to(kernel.dtype)
    return inverse


def _solve(kernel: torch.Tensor, ridge: float) -> torch.Tensor:
    """The inverse with a ridge, the pseudo-inverse without one; in the dtype of the kernel."""
    if ridge > 0:
        one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        return torch.linalg.inv_ex(kernel + ridge * one).inverse.contiguous()  # it comes transposed
    return cut_inverse(kernel)


def _newton(kernel: torch.Tensor, newton_iters: int, ridge: float) -> torch.Tensor:
    """Newton's iteration for (n, M, M), each from a start of its own."""
    one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    row_sum = kernel.sum(-1).amax(-1)[:, None, None]
    matrix = kernel + ridge * one
    inverse = START / row_sum**2 * matrix
    for _ in range(newton_iters):
        inverse = torch.baddbmm(inverse, inverse @ matrix, inverse, beta=2, alpha=-1)
    return inverse


@_kernel_inverse.register_fake
def _(kernel: torch.Tensor, newton_iters: int, ridge: float, check: bool) -> torch.Tensor:
    return kernel.new_empty(kernel.shape)


@_kernel_inverse.register_vmap
def _(info, in_dims, kernel: torch.Tensor, newton_iters: int, ridge: float, check: bool):
    return _kernel_inverse(kernel.movedim(in_dims[0], 0), newton_iters, ridge, check), 0


def _keep(ctx, inputs, output) -> None:
    kernel, _, ctx.ridge, _ = inputs
    ctx.save_for_backward(kernel, output)
    ctx.save_for_forward(kernel, output)


def _pull(ctx, grad: torch.Tensor):
    kernel, inverse = ctx.saved_tensors
    if ctx.ridge == 0 and torch.is_grad_enabled():  # what is pulled back is to be differentiated
        inverse = OnceDifferentiable.apply(kernel, inverse)
    return -inverse.mT @ grad @ inverse.mT, None, None, None


_kernel_inverse.register_autograd(_pull, setup_context=_keep)


class _Transformed(torch.autograd.Function):
    """The operation for torch.func and forward-mode differentiation, which don't see into a custom operation."""

    generate_vmap_rule = True
    setup_context = staticmethod(_keep)
    backward = staticmethod(_pull)

    @staticmethod
    def forward(kernel: torch.Tensor, newton_iters: int, ridge: float, check: bool) -> torch.Tensor:
        return _kernel_inverse(kernel, newton_iters, ridge, check)

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, *_) -> torch.Tensor:
        kernel, inverse = ctx.saved_tensors
        return cut_change(kernel, tangent) if ctx.ridge == 0 else -inverse @ tangent @ inverse
