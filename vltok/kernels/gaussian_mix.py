"""Two products with one Gaussian kernel matrix and a small matrix between them, without ever holding the large one.

`definition` says what is computed, with whole matrices. The operation computes it and its gradients tile by tile, so
that on the CPU a tile that fits in the cache serves all products; on CUDA devices its Triton twin does. Where PyTorch
asks for more than first derivatives, and under torch.func, the definition itself runs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from vltok.checks import check_choice
from vltok.kernels.gaussian import checked, exact_columns, full_precision, gaussian_kernel, split
from vltok.kernels.transforms import is_transformed

Tensors = tuple[torch.Tensor, ...]
BACKENDS = ("auto", "torch", "triton")
WIDEST = 256  # channels of tokens and of values that the Triton kernels hold at once
# Numbers in a tile of the kernel matrix: as many as a CPU core keeps at hand, as many as keep a GPU busy.
CPU_TILE, GPU_TILE = 2**18, 2**24


def gaussian_mix(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    num_exact: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute K W K^T V, where K is `gaussian_kernel(query, landmarks, num_exact)`, without ever holding all of K.

    Differentiable in all inputs. Derivatives of derivatives, forward-mode derivatives and torch.func are right too, but
    hold all of K. Autocast doesn't reach inside.

    Args:
        query: Tokens, (..., N, d). Any float dtype; half precision is computed in float32.
        landmarks: Tokens, (..., M, d).
        values: One row for each query, (..., N, e).
        weight: W, (..., M, M).
        num_exact: How many of the last landmarks may be long: distances to them are summed from differences.
        backend: "torch" runs anywhere; "triton" on CUDA devices, in float32, for at most 256 channels of tokens and of
            values; "auto" takes Triton where it can run and is installed, else torch.

    Returns:
        (..., N, e), float32, or float64 if an input is.

    Raises:
        TypeError: If an input is not a tensor of a float dtype, or `num_exact` no integer.
        ValueError: If shapes or devices don't fit each other, `num_exact` is out of range, or `backend` is unknown or
            can't run on these tensors.
        ImportError: If `backend` is "triton" and it isn't installed.
    """
    check_choice("backend", backend, BACKENDS)
    tensors = checked(num_exact, query=query, landmarks=landmarks, values=values, weight=weight)
    batch, (n, m) = query.shape[:-2], (query.shape[-2], landmarks.shape[-2])
    if values.shape[:-1] != query.shape[:-1] or weight.shape != (*batch, m, m):
        raise ValueError(
            f"values must be (..., N, e) and weight (..., M, M) for query {tuple(query.shape)} and landmarks "
            f"{tuple(landmarks.shape)}, got {tuple(values.shape)} and {tuple(weight.shape)}"
        )
    if is_transformed(*tensors):
        return definition(*tensors, num_exact)
    flat = (x.reshape(math.prod(batch), *x.shape[-2:]) for x in tensors)
    out, _ = _mix(*flat, num_exact, backend)
    return out.reshape(*batch, n, values.shape[-1])


def definition(
    query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, num_exact: int = 0
) -> torch.Tensor:
    """What `gaussian_mix` computes, by whole matrices: plain algebra, right under every transform of PyTorch's."""
    with full_precision(query):
        kernel = gaussian_kernel(query, landmarks, num_exact)
        return kernel @ (weight @ (kernel.mT @ values))


class _Tiles:
    """Tiles of the kernel, all landmarks by some queries of some samples; made again unless one holds all queries."""

    def __init__(self, query: torch.Tensor, landmarks: torch.Tensor) -> None:
        self.query, self.landmarks = query, landmarks
        self.half_query = query.square().sum(-1, keepdim=True).mul_(-0.5)  # (B, N, 1)
        self.half_landmarks = landmarks.square().sum(-1).mul_(-0.5).unsqueeze(1)  # (B, 1, M)
        (self.batch, self.n, _), self.m = query.shape, landmarks.shape[1]
        size = CPU_TILE * torch.get_num_threads() if query.device.type == "cpu" else GPU_TILE
        pieces = -(-self.n * self.m // size)  # of one sample
        self.length = -(-self.n // max(1, pieces))
        self.entries = max(1, min(self.batch, size // max(1, self.n * self.m)))
        self.buffer = query.new_empty(self.entries * self.length * self.m)
        self._held: tuple[int, int] | None = None

    def samples(self) -> Iterator[slice]:
        """Samples whose tiles are made together."""
        for first in range(0, self.batch, self.entries):
            yield slice(first, min(first + self.entries, self.batch))

    def of(self, chosen: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        """Ranges of queries with their tiles, (samples, queries, M); each is overwritten by the next."""
        for start in range(0, self.n, max(1, self.length)):
            rows = slice(start, min(start + self.length, self.n))
            shape = (chosen.stop - chosen.start, rows.stop - start, self.m)
            tile = self.buffer[: math.prod(shape)].view(shape)
            if self._held != (chosen.start, start):
                torch.baddbmm(
                    self.half_landmarks[chosen], self.query[chosen, rows], self.landmarks[chosen].mT, out=tile
                )
                tile.add_(self.half_query[chosen, rows]).clamp_(max=0).exp_()
                self._held = (chosen.start, start)
            yield rows, tile


def forward(
    query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor
) -> Tensors:
    """Compute K W K^T V and K^T V, K being the kernel (B, N, M) and behind it more columns, (B, N, P)."""
    tiles, m = _Tiles(query, landmarks), landmarks.shape[1]
    gathered = torch.cat([values.new_zeros(*landmarks.shape[:2], values.shape[-1]), columns.mT @ values], 1)
    out = values.new_empty(values.shape)  # contiguous, whatever the values are
    for chosen in tiles.samples():
        for rows, tile in tiles.of(chosen):
            gathered[chosen, :m].baddbmm_(tile.mT, values[chosen, rows])
        mixed = weight[chosen] @ gathered[chosen]
        for rows, tile in tiles.of(chosen):
            out[chosen, rows] = tile @ mixed[:, :m]
        out[chosen].baddbmm_(columns[chosen], mixed[:, m:])
    return out, gathered


def backward(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    gathered: torch.Tensor,
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of the five inputs, given g, that of the output, and K^T V.

    With u = W^T K^T g and E = (g (W K^T V)^T + V u^T) * K they are E L - rowsum(E) Q, E^T Q - colsum(E) L, K u,
    K^T g (K^T V)^T, and g (W K^T V)^T + V u^T itself for the other columns.
    """
    tiles, m = _Tiles(query, landmarks), landmarks.shape[1]
    grad = grad.contiguous()
    received = torch.cat([torch.zeros_like(gathered[:, :m]), columns.mT @ grad], 1)
    grad_query, grad_values = query.new_empty(query.shape), values.new_empty(values.shape)
    grad_landmarks, grad_columns = torch.zeros_like(landmarks), torch.empty_like(columns)
    sums = torch.zeros_like(landmarks[..., :1])  # of the columns of E
    spread = torch.empty_like(tiles.buffer)
    for chosen in tiles.samples():
        for rows, tile in tiles.of(chosen):
            received[chosen, :m].baddbmm_(tile.mT, grad[chosen, rows])
        mixed, back = weight[chosen] @ gathered[chosen], weight[chosen].mT @ received[chosen]
        for rows, tile in tiles.of(chosen):
            grad_values[chosen, rows] = tile @ back[:, :m]
            change = torch.bmm(grad[chosen, rows], mixed[:, :m].mT, out=spread[: tile.numel()].view(tile.shape))
            change.baddbmm_(values[chosen, rows], back[:, :m].mT).mul_(tile)
            part = change @ landmarks[chosen]
            grad_query[chosen, rows] = part.addcmul_(query[chosen, rows], change.sum(-1, keepdim=True), value=-1)
            grad_landmarks[chosen].baddbmm_(change.mT, query[chosen, rows])
            sums[chosen].add_(change.sum(-2).unsqueeze(-1))
        grad_values[chosen].baddbmm_(columns[chosen], back[:, m:])
        grad_columns[chosen] = torch.baddbmm(grad[chosen] @ mixed[:, m:].mT, values[chosen], back[:, m:].mT)
    grad_landmarks.addcmul_(sums, landmarks, value=-1)
    return [grad_query, grad_landmarks, grad_values, received @ gathered.mT, grad_columns]


def _implementation(backend: str, query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run on these; "auto" takes Triton on CUDA devices, where it can."""
    here = sys.modules[__name__]
    is_empty = min(query.numel(), landmarks.numel(), values.numel()) == 0
    if backend == "torch" or is_empty or (backend == "auto" and query.device.type != "cuda"):
        return here
    is_interpreted = query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    width = max(query.shape[-1], values.shape[-1])
    refusal = None
    if query.device.type != "cuda" and not is_interpreted:
        refusal = f"needs CUDA tensors, or TRITON_INTERPRET=1 to run in its interpreter on the CPU; got {query.device}"
    elif query.dtype != torch.float32:
        refusal = f"computes in float32, got {query.dtype}"
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


@torch.library.custom_op("vltok::gaussian_mix", mutates_args=())
def _mix(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    num_exact: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    near, far = split(landmarks, num_exact)
    with full_precision(query):
        run = _implementation(backend, query, near, values).forward
        return run(query, near, values, weight, exact_columns(query, far))


@torch.library.custom_op("vltok::gaussian_mix_grad", mutates_args=())
def _mix_grad(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    gathered: torch.Tensor,
    grad: torch.Tensor,
    num_exact: int,
    backend: str,
) -> list[torch.Tensor]:
    near, far = split(landmarks, num_exact)
    with full_precision(query):
        columns = exact_columns(query, far)
        run = _implementation(backend, query, near, values).backward
        grad_query, grad_near, *others, pull = run(query, near, values, weight, columns, gathered, grad)
        pull.mul_(columns)
        grad_far = torch.empty_like(far)
        for i in range(num_exact):
            pulled = (far[:, i : i + 1] - query).mul_(pull[..., i : i + 1])  # (B, N, d)
            grad_query += pulled
            grad_far[:, i] = -pulled.sum(1)
        return [grad_query, torch.cat([grad_near, grad_far], 1), *others]


@_mix.register_fake
def _(query, landmarks, values, weight, num_exact, backend):
    return values.new_empty(values.shape), values.new_empty(*landmarks.shape[:2], values.shape[-1])


@_mix_grad.register_fake
def _(query, landmarks, values, weight, gathered, grad, num_exact, backend):
    return [x.new_empty(x.shape) for x in (query, landmarks, values, weight)]


def _save(ctx, inputs, output):
    *tensors, ctx.num_exact, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    *tensors, gathered = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return *_mix_grad(*tensors, gathered, grad, ctx.num_exact, ctx.backend), None, None
    # The gradient is to have a gradient: autograd derives both. It must take none of the inputs as made from another.
    tensors = [x.view_as(x) for x in tensors]
    wanted = [x for x, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(definition(*tensors, ctx.num_exact), wanted, grad, create_graph=True))
    return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:4]), None, None


_mix.register_autograd(_backward, setup_context=_save)
