"""Two products with one Gaussian kernel matrix and a small matrix between them, forward and backward in one pass each.

What `vltok.kernels.gaussian` computes product by product is computed here tile by tile, so that on the CPU a tile that
fits in the cache serves all products, and squared norms are summed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vltok.kernels import gaussian

Tensors = tuple[torch.Tensor, ...]
TILE = 2**18  # numbers of the kernel matrix that a CPU core keeps at hand


def gaussian_mix(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute K W K^T V, where K is `gaussian_kernel(query, landmarks)`, without ever holding all of K.

    Differentiable once, in all inputs.

    Args:
        query: Tokens, (..., N, d), float32 or float64, as all inputs are.
        landmarks: Tokens, (..., M, d).
        values: One row for each query, (..., N, e).
        weight: W, (..., M, M).
        backend: As for `vltok.kernels.gaussian.gaussian_product`.

    Returns:
        (..., N, e).
    """
    batch = query.shape[:-2]
    flat = (x.reshape(batch.numel(), *x.shape[-2:]) for x in (query, landmarks, values, weight))
    out, _ = _mix(*flat, backend)
    return out.reshape(*batch, *out.shape[1:])


def _is_fused(query: torch.Tensor, backend: str) -> bool:
    return query.device.type == "cpu" and backend != "triton"


class _Tiles:
    """Tiles of the kernel, all landmarks by some queries of some samples; made again unless one holds all queries."""

    def __init__(self, query: torch.Tensor, landmarks: torch.Tensor) -> None:
        self.query, self.landmarks = query, landmarks
        self.half_query = query.square().sum(-1, keepdim=True).mul_(-0.5)  # (B, N, 1)
        self.half_landmarks = landmarks.square().sum(-1).mul_(-0.5).unsqueeze(1)  # (B, 1, M)
        (self.batch, self.n, _), self.m = query.shape, landmarks.shape[1]
        size = TILE * torch.get_num_threads()
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
        for start in range(0, self.n, self.length):
            rows = slice(start, min(start + self.length, self.n))
            shape = (chosen.stop - chosen.start, rows.stop - start, self.m)
            tile = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            if self._held != (chosen.start, start):
                torch.baddbmm(
                    self.half_landmarks[chosen], self.query[chosen, rows], self.landmarks[chosen].mT, out=tile
                )
                tile.add_(self.half_query[chosen, rows]).clamp_(max=0).exp_()
                self._held = (chosen.start, start)
            yield rows, tile


def _forward(query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> Tensors:
    tiles = _Tiles(query, landmarks)
    gathered = values.new_zeros(*landmarks.shape[:2], values.shape[-1])
    out = torch.empty_like(values)
    for chosen in tiles.samples():
        for rows, tile in tiles.of(chosen):
            gathered[chosen].baddbmm_(tile.mT, values[chosen, rows])
        mixed = weight[chosen] @ gathered[chosen]
        for rows, tile in tiles.of(chosen):
            out[chosen, rows] = tile @ mixed
    return out, gathered


def _backward(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    gathered: torch.Tensor,
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of the four inputs, given g, that of the output.

    With u = W^T K^T g and E = (g (W K^T V)^T + V u^T) * K they are E L - rowsum(E) Q, E^T Q - colsum(E) L, K u, and
    K^T g (K^T V)^T.
    """
    tiles = _Tiles(query, landmarks)
    grad = grad.contiguous()
    received = torch.zeros_like(gathered)
    grad_query, grad_values = torch.empty_like(query), torch.empty_like(values)
    grad_landmarks = torch.zeros_like(landmarks)
    columns = torch.zeros_like(landmarks[..., :1])  # sums of E
    spread = torch.empty_like(tiles.buffer)
    for chosen in tiles.samples():
        for rows, tile in tiles.of(chosen):
            received[chosen].baddbmm_(tile.mT, grad[chosen, rows])
        mixed, back = weight[chosen] @ gathered[chosen], weight[chosen].mT @ received[chosen]
        for rows, tile in tiles.of(chosen):
            grad_values[chosen, rows] = tile @ back
            change = torch.bmm(grad[chosen, rows], mixed.mT, out=spread[: tile.numel()].view(tile.shape))
            change.baddbmm_(values[chosen, rows], back.mT).mul_(tile)
            part = change @ landmarks[chosen]
            grad_query[chosen, rows] = part.addcmul_(query[chosen, rows], change.sum(-1, keepdim=True), value=-1)
            grad_landmarks[chosen].baddbmm_(change.mT, query[chosen, rows])
            columns[chosen].add_(change.sum(-2).unsqueeze(-1))
    grad_landmarks.addcmul_(columns, landmarks, value=-1)
    return [grad_query, grad_landmarks, grad_values, received @ gathered.mT]


@torch.library.custom_op("vltok::gaussian_mix", mutates_args=())
def _mix(
    query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        if _is_fused(query, backend):
            return _forward(query, landmarks, values, weight)
        gathered = gaussian.gaussian_product(landmarks, query, values, backend)
        return gaussian.gaussian_product(query, landmarks, weight @ gathered, backend), gathered


@torch.library.custom_op("vltok::gaussian_mix_grad", mutates_args=())
def _mix_grad(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    gathered: torch.Tensor,
    grad: torch.Tensor,
    backend: str,
) -> list[torch.Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        if _is_fused(query, backend):
            return _backward(query, landmarks, values, weight, gathered, grad)
        received = gaussian.gaussian_product(landmarks, query, grad, backend)
        mixed, back = weight @ gathered, weight.mT @ received
        grads = gaussian._product_grad(query, landmarks, mixed, grad, [True, True, False], backend)
        others = gaussian._product_grad(landmarks, query, values, back, [True, True, True], backend)
        return [grads[0] + others[1], grads[1] + others[0], others[2], received @ gathered.mT]


@_mix.register_fake
def _(query, landmarks, values, weight, backend):
    return values.new_empty(values.shape), values.new_empty(*landmarks.shape[:2], values.shape[-1])


@_mix_grad.register_fake
def _(query, landmarks, values, weight, gathered, grad, backend):
    return [x.new_empty(x.shape) for x in (query, landmarks, values, weight)]


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _mix_backward(ctx, grad, _):
    return *_mix_grad(*ctx.saved_tensors, grad, ctx.backend), None


_mix.register_autograd(_mix_backward, setup_context=_save)
