"""The Gaussian kernel of two sets of tokens."""

from __future__ import annotations

import contextlib

import torch

from vltok.checks import check_integer


def gaussian_kernel(a: torch.Tensor, b: torch.Tensor | None = None, num_exact: int = 0) -> torch.Tensor:
    """Kernel matrix of two sets of tokens, K_ij = exp(-|a_i - b_j|^2 / 2).

    The squared distance is |a|^2 + |b|^2 - 2 a b, which rounds to about 1e-7 of the larger square in float32; what
    falls below 0 counts as 0, so that no entry exceeds 1. Tokens so long that this is coarse come last, counted by
    `num_exact`: distances to them are summed from differences.

    Args:
        a: Tokens, (..., N, d). Any float dtype; half precision is computed in float32.
        b: Tokens, (..., M, d). Without them the kernel is that of `a` with itself, and its diagonal exactly 1.
        num_exact: How many of the last columns (without `b`: and rows) are exact, in 0..M.

    Returns:
        Kernel, (..., N, M), in 0..1, float32, or float64 if an input is. Differentiable in both.

    Raises:
        TypeError: If an input is not a tensor of a float dtype, or `num_exact` no integer.
        ValueError: If the shapes don't fit each other, or `num_exact` is out of range.
    """
    is_own = b is None
    a, b = checked(num_exact, a=a, b=a if is_own else b)
    near, far = split(b, num_exact)
    with full_precision(a):
        half_a, half_near = (x.square().sum(-1, keepdim=True) / 2 for x in (a, near))
        exponent = (a @ near.mT - half_a - half_near.mT).clamp(max=0)
        if num_exact:
            squares = (a.unsqueeze(-2) - far.unsqueeze(-3)).square().sum(-1)
            exponent = torch.cat([exponent, squares * -0.5], -1)
        if is_own:
            exponent = torch.cat([split(exponent, num_exact)[0], split(exponent.mT, num_exact)[1]], -2)
            exponent = exponent.masked_fill(torch.eye(a.shape[-2], dtype=torch.bool, device=a.device), 0)
        return exponent.exp()


def exact_columns(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernel from differences, (B, N, d) and (B, P, d) -> (B, N, P), for few b; holds N x d numbers beside it."""
    squares = a.new_empty(*a.shape[:2], b.shape[1])
    for i in range(b.shape[1]):
        squares[..., i] = (a - b[:, i : i + 1]).square_().sum(-1)
    return squares.mul_(-0.5).exp_()


def split(tokens: torch.Tensor, num_exact: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in two: those before the last `num_exact`, and these."""
    count = tokens.shape[-2] - num_exact
    return tokens[..., :count, :], tokens[..., count:, :]


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """No autocast on the device of a tensor, which may be one that knows none, such as "meta"."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def checked(num_exact: int, **tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors at the dtype they are computed in: a (..., N, d), b (..., M, d), and what other rows there are.

    Raises:
        TypeError, ValueError: As for `gaussian_kernel`.
    """
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of a float dtype, got {got}")
        if x.dim() < 2:
            raise ValueError(f"{name} must be (..., tokens, channels), got {tuple(x.shape)}")
    (name_a, a), (name_b, b), *_ = tensors.items()
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name_a} and {name_b} must be (..., N, d) and (..., M, d) with the same leading sizes and d, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, x in tensors.items():
        if x.device != a.device:
            raise ValueError(f"all tensors must be on one device, got {name_a} on {a.device} and {name} on {x.device}")
    check_integer("num_exact", num_exact, least=0)
    if num_exact > b.shape[-2]:
        raise ValueError(f"num_exact must be at most {b.shape[-2]}, the tokens of {name_b}; got {num_exact}")
    is_double = any(x.dtype == torch.float64 for x in tensors.values())
    return [x.to(torch.float64 if is_double else torch.float32) for x in tensors.values()]
