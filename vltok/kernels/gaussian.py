"""Products with a Gaussian kernel matrix that is never held whole.

`gaussian_kernel` is the definition, `gaussian_product` the operation: the kernel matrix between two sets of tokens
times values. It computes the matrix tile by tile, forward and backward, so that a tile stays in the processor's cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

BACKENDS = ("auto", "torch", "triton")
WIDEST = 256  # channels of tokens and of values that the Triton kernels hold at once
# Numbers in a tile of the kernel matrix: few enough for a core's own cache, enough for products to run at full speed.
CPU_TILE, GPU_TILE = 2**17, 2**24


def gaussian_kernel(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Kernel matrix of two sets of tokens, K_ij = exp(-|a_i - b_j|^2 / 2).

    The squared distance is |a|^2 + |b|^2 - 2 a b, which rounds to about 1e-7 of the larger square in float32; what
    falls below 0 counts as 0, so that no entry exceeds 1.

    Args:
        a: Tokens, (..., N, d). Any float dtype; half precision is computed in float32.
        b: Tokens, (..., M, d). Without them the kernel is that of `a` with itself, and its diagonal exactly 1.

    Returns:
        Kernel, (..., N, M), in 0..1, float32, or float64 if an input is. Differentiable in both.

    Raises:
        TypeError: If an input is not a tensor of a float dtype.
        ValueError: If the shapes don't fit each other.
    """
    is_own = b is None
    a, b = _checked(a=a, b=a if is_own else b)
    with torch.autocast(a.device.type, enabled=False):
        left, right = augment(a, b)
        exponent = (left @ right.mT).clamp(max=0)
        if is_own:
            exponent = exponent.masked_fill(torch.eye(a.shape[-2], dtype=torch.bool, device=a.device), 0)
        return exponent.exp()


def gaussian_product(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Kernel matrix times values, `gaussian_kernel(a, b) @ values`, without ever holding N x M numbers.

    Differentiable once, in all three inputs. Autocast doesn't reach inside.

    Args:
        a: Tokens, (..., N, d). Any float dtype; half precision is computed in float32.
        b: Tokens, (..., M, d).
        values: One row for each token of `b`, (..., M, e).
        backend: "torch" runs anywhere; "triton" on CUDA devices, in float32, for at most 256 channels of tokens and of
            values; "auto" takes Triton where it can run and is installed, else torch.

    Returns:
        Product, (..., N, e), float32, or float64 if an input is.

    Raises:
        TypeError: If an input is not a tensor of a float dtype.
        ValueError: If shapes or devices don't fit each other, or `backend` is unknown or can't run on these tensors.
        ImportError: If `backend` is "triton" and it isn't installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    a, b, values = _checked(a=a, b=b, values=values)
    batch = a.shape[:-2]
    out = _product(*(x.reshape(batch.numel(), *x.shape[-2:]) for x in (a, b, values)), backend)
    return out.reshape(*batch, *out.shape[1:])


def _checked(**tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors at the dtype they are computed in."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of a float dtype, got {got}")
        if x.dim() < 2:
            raise ValueError(f"{name} must be (..., tokens, channels), got {tuple(x.shape)}")
    a, b, values = tensors["a"], tensors["b"], tensors.get("values")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must be (..., N, d) and (..., M, d) with the same leading sizes and d, got {shapes}")
    if values is not None and values.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"values must be (..., M, e), one row for each of b (..., M, d), got {shapes}")
    if len({x.device for x in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {devices}")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
    return [x.to(dtype) for x in tensors.values()]


def augment(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with two channels more, so that one product of them is the whole exponent, a b - |b|^2 / 2 - |a|^2 / 2."""
    ones_a, ones_b = (torch.ones_like(x[..., :1]) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1) for x in (a, b))
    half_a, half_b = (x.square().sum(-1, keepdim=True).mul(-0.5) for x in (a, b))
    return torch.cat((a, ones_a, half_a), -1), torch.cat((b, half_b, ones_b), -1)


def _tiles(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[slice, slice, slice, torch.Tensor]]:
    """Cut the kernel of augmented tokens: batch entries, rows, columns, and that tile; it is overwritten by the next.

    Only the longer side is cut, and the batch where whole matrices are small.
    """
    (batch, n, _), m = left.shape, right.shape[1]
    size = CPU_TILE * torch.get_num_threads() if left.device.type == "cpu" else GPU_TILE
    long, short = max(n, m), min(n, m)
    length = max(1, min(long, size // max(1, short)))
    entries = max(1, min(batch, size // max(1, long * short)))
    buffer = left.new_empty(entries * length * short)
    for first in range(0, batch, entries):
        chosen = slice(first, min(first + entries, batch))
        for start in range(0, long, length):
            part, whole = slice(start, min(start + length, long)), slice(0, short)
            rows, columns = (part, whole) if n >= m else (whole, part)
            shape = (chosen.stop - first, rows.stop - rows.start, columns.stop - columns.start)
            tile = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(left[chosen, rows], right[chosen, columns].mT, out=tile)
            yield chosen, rows, columns, tile.clamp_(max=0).exp_()


def apply(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """K(a, b) values for (B, N, d), (B, M, d), (B, M, e) of one dtype -> (B, N, e)."""
    out = values.new_zeros(*a.shape[:2], values.shape[-1])
    for chosen, rows, columns, tile in _tiles(*augment(a, b)):
        out[chosen, rows].baddbmm_(tile, values[chosen, columns])
    return out


def grad(
    a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, grad_out: torch.Tensor, needed: list[bool]
) -> list[torch.Tensor]:
    """Gradients of a, b and values, those that are `needed`, given that of the product, (B, N, e).

    With E = (grad_out values^T) * K they are E b - rowsum(E) a, E^T a - colsum(E) b and K^T grad_out.
    """
    left, right = augment(a, b)
    grad_out = grad_out.contiguous()
    grad_left, grad_right, grad_values = (
        x.new_zeros(x.shape) if wanted else None for x, wanted in zip((left, right, values), needed, strict=True)
    )
    for chosen, rows, columns, tile in _tiles(left, right):
        g = grad_out[chosen, rows]
        if grad_values is not None:
            grad_values[chosen, columns].baddbmm_(tile.mT, g)
        if grad_left is not None or grad_right is not None:
            tile = torch.bmm(g, values[chosen, columns].mT).mul_(tile)
        if grad_left is not None:
            grad_left[chosen, rows].baddbmm_(tile, right[chosen, columns])
        if grad_right is not None:
            grad_right[chosen, columns].baddbmm_(tile.mT, left[chosen, rows])
    grads, d = [], a.shape[-1]
    # the product with the channel of ones is the sum of E over rows or columns
    if grad_left is not None:
        grads.append(torch.addcmul(grad_left[..., :d], grad_left[..., d + 1 :], a, value=-1))
    if grad_right is not None:
        grads.append(torch.addcmul(grad_right[..., :d], grad_right[..., d : d + 1], b, value=-1))
    return grads + [x for x in (grad_values,) if x is not None]


def _implementation(backend: str, a: torch.Tensor, values: torch.Tensor) -> ModuleType:
    """The module whose `apply` and `grad` run on these tensors; "auto" takes Triton on CUDA devices, where it can."""
    here = sys.modules[__name__]
    if backend == "torch" or (backend == "auto" and a.device.type != "cuda"):
        return here
    is_interpreted = a.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    width = max(a.shape[-1], values.shape[-1])
    refusal = None
    if a.device.type != "cuda" and not is_interpreted:
        refusal = f"needs CUDA tensors, or TRITON_INTERPRET=1 to run in its interpreter on the CPU; got {a.device}"
    elif a.dtype != torch.float32:
        refusal = f"computes in float32, got {a.dtype}"
    elif width > WIDEST:
        refusal = f"takes at most {WIDEST} channels of tokens and of values, got {width}"
    if refusal is None:
        try:
            from vltok.kernels import gaussian_triton
        except ImportError as error:
            if backend == "triton":
                raise ImportError(
                    "backend='triton' needs the package triton, which could not be imported; run `pip install triton`, "
                    "or use backend='torch' or 'auto'"
                ) from error
            return here
        if not is_interpreted or gaussian_triton.IS_INTERPRETED:
            return gaussian_triton
        refusal = "was loaded without its interpreter; set TRITON_INTERPRET=1 before Python starts"
    if backend == "auto":
        return here
    raise ValueError(f"backend='triton' {refusal}; or use backend='torch'")


@torch.library.custom_op("vltok::gaussian_product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, backend: str) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return _implementation(backend, a, values).apply(a, b, values)


@torch.library.custom_op("vltok::gaussian_product_grad", mutates_args=())
def _product_grad(
    a: torch.Tensor,
    b: torch.Tensor,
    values: torch.Tensor,
    grad_out: torch.Tensor,
    needed: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    with torch.autocast(a.device.type, enabled=False):
        return _implementation(backend, a, values).grad(a, b, values, grad_out, needed)


@_product.register_fake
def _(a, b, values, backend):
    return values.new_empty(*a.shape[:2], values.shape[-1])


@_product_grad.register_fake
def _(a, b, values, grad_out, needed, backend):
    return [x.new_empty(x.shape) for x, wanted in zip((a, b, values), needed, strict=True) if wanted]


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    needed = list(ctx.needs_input_grad[:3])
    grads = iter(_product_grad(*ctx.saved_tensors, grad_out, needed, ctx.backend))
    return *(next(grads) if wanted else None for wanted in needed), None


_product.register_autograd(_backward, setup_context=_save)
