"""The attention diversification loss: how alike the tokens are that the queries of a ViT attend to.

Paper: https://arxiv.org/abs/2303.11126 (ADL). Differs from the released code for a single picture, whose loss is 0
there and computed here, and in what it holds: the mean over the heads of some samples at a time, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from vltok.autograd import autocast_off, gradients_to_differentiate, runs_eagerly
from vltok.checks import is_number

EPS = 1e-8  # below which a vector counts as 0, as in torch's cosine similarity
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26  # probabilities at hand at a time


def attention_diversification_loss(
    attention: torch.Tensor | Sequence[torch.Tensor], threshold: float = 2.0
) -> torch.Tensor:
    """Mean cosine similarity between what each query attends to and what all do on average, of attention maps.

    Probabilities are averaged over the heads, and those that don't exceed `threshold` / N count as 0.

    Args:
        attention: Attention probabilities, (B, heads, N, N), or several such maps, one per block, of any sizes. Any
            float dtype; computed in float32.
        threshold: In multiples of what uniform attention gives, above 0.

    Returns:
        A scalar in [0, 1], float32, or float64 if an input is; the mean over the maps. 0, with gradients of 0, where
        nothing exceeds the threshold.

    Raises:
        TypeError: If a map is not a tensor of a float dtype, or `threshold` is not a number.
        ValueError: If there is no map, its shape is another, or `threshold` is out of range.
    """
    _check_threshold(threshold)
    maps = [attention] if isinstance(attention, torch.Tensor) else list(attention)
    if not maps:
        raise ValueError("attention must be a map (B, heads, N, N) or several, got none")
    for each in maps:
        if not isinstance(each, torch.Tensor) or not each.is_floating_point():
            got = each.dtype if isinstance(each, torch.Tensor) else type(each).__name__
            raise TypeError(f"attention must be tensors of a float dtype, got {got}")
        if each.dim() != 4 or each.shape[-1] != each.shape[-2] or not each.numel():
            raise ValueError(f"attention must be (B, heads, N, N), got {tuple(each.shape)}")
    plain, lean = (partial(function, threshold=threshold) for function in (map_loss, _lean_map_loss))
    losses = [_loss(plain, lean, each) for each in maps]
    return torch.stack([loss.to(losses[0]) for loss in losses]).mean()


def score_diversification_loss(
    query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float = 2.0
) -> torch.Tensor:
    """The loss of softmax(scale * query key^T), without holding the attention maps of all heads and samples.

    Gradients are computed along with the loss, and held in their place.

    Args:
        query: Queries, (B, heads, N, d). Any float dtype; computed in float32.
        key: Keys, (B, heads, N, d).
        scale: What products of queries and keys are multiplied by.
        threshold: As for `attention_diversification_loss`.

    Returns:
        A scalar in [0, 1], float32, or float64 if an input is.

    Raises:
        ValueError: If the shapes are others, or `threshold` is out of range.
    """
    _check_threshold(threshold)
    if query.dim() != 4 or query.shape != key.shape or not query.numel():
        raise ValueError(
            f"query and key must both be (B, heads, N, d), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    settings = {"scale": scale, "threshold": threshold}
    plain, lean = (partial(function, **settings) for function in (score_loss, _lean_score_loss))
    return _loss(plain, lean, query, key)


class AttentionDiversificationLoss(nn.Module):
    """`attention_diversification_loss` as a module, without weights.

    Args:
        threshold: In multiples of what uniform attention gives, above 0.

    Raises:
        TypeError, ValueError: If `threshold` is not a number above 0.
    """

    def __init__(self, threshold: float = 2.0) -> None:
        super().__init__()
        _check_threshold(threshold)
        self.threshold = threshold

    def forward(self, attention: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Attention maps, (B, heads, N, N), one or several -> a scalar."""
        return attention_diversification_loss(attention, self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


def _check_threshold(threshold: float) -> None:
    if not is_number(threshold):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be above 0 and finite, got {threshold}")


def map_loss(attention: torch.Tensor, threshold: float) -> torch.Tensor:
    """The loss of maps, (B, heads, N, N)."""
    means = attention.sum(1, dtype=_wide(attention)) / attention.shape[1]  # a sum's gradient takes no memory
    count = means.shape[-1]
    average = means.mean(1, keepdim=True)
    rows, average = (x * (x > threshold / count) for x in (means, average))
    # Not F.cosine_similarity, whose second derivative is NaN where a row is 0.
    length, length_average = (x.square().sum(-1).clamp(min=EPS**2).sqrt() for x in (rows, average))
    return ((rows * average).sum(-1) / (length * length_average)).mean()


def score_loss(query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float) -> torch.Tensor:
    """The loss of softmax(scale * query key^T)."""
    with autocast_off(query):
        query, key = (x.to(_wide(x)) for x in (query, key))
        return map_loss(((query * scale) @ key.mT).softmax(-1), threshold)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _loss(
    plain: Callable[..., torch.Tensor], lean: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor
) -> torch.Tensor:
    """What `plain` gives, computed by its lean twin where that may run."""
    if not runs_eagerly():
        return plain(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _WithGradients.apply(plain, lean, *inputs)
    return lean(*inputs, with_grad=False)[0]


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed along with it and held, instead of what they come from.

    Beside autograd's own way it takes about 0.6 to 0.85 of the time on a CPU, and for queries and keys 0.4 to 0.6 of
    the memory.
    """

    @staticmethod
    def forward(ctx, plain, lean, *inputs: torch.Tensor) -> torch.Tensor:
        loss, *grads = lean(*inputs, with_grad=True)
        ctx.plain = plain
        ctx.save_for_backward(*inputs, *grads)
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, grads = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():
            return None, None, *gradients_to_differentiate(ctx.plain, inputs, grad)
        scaled = (own * grad.to(own.dtype) for own in grads)
        return None, None, *(own.to(x.dtype).expand(x.shape) for own, x in zip(scaled, inputs, strict=True))


def _lean_map_loss(attention: torch.Tensor, threshold: float, with_grad: bool) -> tuple[torch.Tensor, ...]:
    """`map_loss`, and its gradient for every head alike, (B, 1, N, N)."""
    batch, heads, count, _ = attention.shape
    wide = _wide(attention)
    loss = attention.new_zeros((), dtype=wide)
    grad = attention.new_empty(batch if with_grad else 0, 1, count, count, dtype=wide)
    with autocast_off(attention):
        for chosen in _chunks(batch, heads * count * count, attention.device):
            part, part_grad = _loss_of_means(attention[chosen].mean(1, dtype=wide), threshold, batch)
            loss += part
            if with_grad:
                grad[chosen, 0] = part_grad / heads
    return loss, grad


def _lean_score_loss(
    query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float, with_grad: bool
) -> tuple[torch.Tensor, ...]:
    """`score_loss`, and its gradients for queries and keys.

    These are float32 for float16, where most would round to 0 before a loss scaler multiplies them.
    """
    batch, heads, count, _ = query.shape
    wide = _wide(query)
    loss = query.new_zeros((), dtype=wide)
    shape, held = query.shape if with_grad else (0,), torch.promote_types(query.dtype, torch.bfloat16)
    grad_query, grad_key = (query.new_empty(shape, dtype=held) for _ in range(2))
    with autocast_off(query):
        for chosen in _chunks(batch, heads * count * count, query.device):
            own = (x[chosen].to(wide).contiguous() for x in (query, key))
            part, *grads = _sample_loss(*own, scale, threshold, batch, with_grad)
            loss += part
            if with_grad:
                grad_query[chosen], grad_key[chosen] = grads
    return loss, grad_query, grad_key


def _chunks(batch: int, per_sample: int, device: torch.device) -> Iterator[slice]:
    """Samples that are computed together."""
    size = max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // per_sample)
    for first in range(0, batch, size):
        yield slice(first, min(first + size, batch))


def _sample_loss(
    query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float, batch: int, with_grad: bool
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of some samples, (S, heads, N, d), some rows of their attention maps at a time."""
    samples, heads, count, _ = query.shape
    size = (CPU_CHUNK if query.device.type == "cpu" else GPU_CHUNK) // (samples * heads * count)
    length = min(count, max(size, 16))

    def probabilities(rows: slice) -> torch.Tensor:
        return ((query[:, :, rows] * scale) @ key.mT).softmax(-1)

    parts = [slice(start, min(start + length, count)) for start in range(0, count, length)]
    means = query.new_empty(samples, count, count)
    for rows in parts:
        held = probabilities(rows)
        torch.mean(held, 1, out=means[:, rows]) if len(parts) == 1 else means[:, rows].copy_(held.mean(1))
    loss, grad = _loss_of_means(means, threshold, batch)
    if not with_grad:
        return loss, query, key
    grad *= scale / heads
    grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
    for rows in parts:
        if len(parts) > 1:
            held = probabilities(rows)
        change = held * grad[:, None, rows]
        change.addcmul_(held, change.sum(-1, keepdim=True), value=-1)  # through the softmax
        grad_query[:, :, rows] = change @ key
        grad_key += change.mT @ query[:, :, rows]
    return loss, grad_query, grad_key


def _loss_of_means(means: torch.Tensor, threshold: float, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient, from head means (S, N, N): this part's share of the mean over `batch` samples.

    With a row a, the average row m, both thresholded, and c their cosine, the gradient of a row is
    m / (|a| |m|) - c a / |a|^2, and that of the average is the like.
    """
    count = means.shape[-1]
    least = threshold / count
    average = means.mean(1)  # (S, N)
    passes, passes_average = means > least, average > least
    rows, average = means * passes, average * passes_average
    length = rows.norm(dim=-1)  # (S, N)
    length_average = average.norm(dim=-1, keepdim=True)  # (S, 1)
    products = (rows @ average.unsqueeze(-1)).squeeze(-1)
    inverse = (length.clamp(min=EPS) * length_average.clamp(min=EPS)).reciprocal()
    cosine = products * inverse
    of_average = (rows.mT @ inverse.unsqueeze(-1)).squeeze(-1)
    of_average -= cosine.sum(-1, keepdim=True) / length_average.square().clamp(min=EPS**2) * average
    own = (cosine / length.square().clamp(min=EPS**2)).unsqueeze(-1)
    grad = torch.addcmul(inverse.unsqueeze(-1) * average.unsqueeze(1), rows, own, value=-1).mul_(passes)
    grad += (of_average * passes_average / count).unsqueeze(1)
    return cosine.sum() / (batch * count), grad / (batch * count)
