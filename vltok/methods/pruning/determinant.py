"""Greedy picks that span the largest volume (MAP of a determinantal point process): what CDPruner and OTPrune share.

The fast greedy MAP of Chen, Zhang and Zhou, https://arxiv.org/abs/1709.05135: a Cholesky factor of the picked tokens'
kernel grows by a column per pick, O(N num_keep^2) in all.
"""

from __future__ import annotations

import math

import torch

from vltok.methods.pruning.greedy import CosineRows, pick_by_cosine, times_row, unusable

# A token is in the span of those picked where they leave less than this share of its squared length; float32 can't tell
# a smaller share from none.
SPANNED = 1e-5


def max_determinant_order(
    tokens: torch.Tensor, num_keep: int, weights: torch.Tensor | None = None, ridge: float = 0.0
) -> torch.Tensor:
    """Pick again and again the token that multiplies the determinant of the picked tokens' kernel most.

    The kernel of tokens i and j is w_i w_j cos(x_i, x_j), plus `ridge` where i = j. Without ridge the determinant is 0
    once the picked tokens span all others, and from then on the tokens of most weight follow.

    Args:
        tokens: B sets of tokens, (B, N, D), any float dtype. A row of norm zero is similar to none.
        num_keep: Picks per set, in 1..N.
        weights: (B, N), at least 0; None weighs all the same.
        ridge: At least 0.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index.

    Raises:
        ValueError: If `num_keep` is out of range, or an embedding or a weight is NaN or infinite.
    """
    if weights is None:
        weights = torch.ones(tokens.shape[:2], device=tokens.device)
    if weights.shape != tokens.shape[:2] or not weights.is_floating_point():
        raise ValueError(
            f"the weights must be floats, one for each of {tuple(tokens.shape[:2])} tokens, got {weights.dtype} of "
            f"shape {tuple(weights.shape)}"
        )
    weights = weights.detach().float()

    def follow(rows: CosineRows, part: slice) -> torch.Tensor:
        return _follow(rows, weights[part], num_keep, ridge)

    picks, usable = pick_by_cosine(tokens, num_keep, follow)
    if not (usable & weights.isfinite().all()):  # the one point where the host waits
        if not usable:
            raise unusable(tokens)
        raise ValueError("the weights of visual tokens hold NaN or infinite values")
    return picks


def _follow(rows: CosineRows, weights: torch.Tensor, num_keep: int, ridge: float) -> torch.Tensor:
    batch, length = weights.shape
    squares = weights.square().masked_fill(rows.norms == 0, 0)
    floor = squares * (0 if ridge else SPANNED)
    left = squares + ridge  # what of each token's squared length the picked ones don't span
    # Rows of the Cholesky factor. A multiple of 4 columns, as products would break ties between equal rows else.
    factor = torch.zeros(batch, length, math.ceil(num_keep / 4) * 4, device=weights.device)
    flat_factor = factor.view(batch * length, -1)
    offsets = torch.arange(batch, device=weights.device) * length
    product = torch.zeros_like(weights)
    images, outs = factor.unbind(), product.unsqueeze(2).unbind()
    nothing = torch.tensor(-math.inf, device=weights.device)
    picks, gains = [], []
    for step in range(num_keep):
        # A picked token's own cosine is infinite, so what is left of it is -inf or NaN; of all, where nothing is left.
        left = torch.where(left > floor, left, nothing)
        gain, pick = left.max(1)  # documented to give the first of equal values
        picks.append(pick)
        gains.append(gain)
        if step == num_keep - 1:
            break
        kernel = rows.row_of(pick).mul_(weights).mul_(weights.gather(1, pick.unsqueeze(1)))
        if step:
            used = math.ceil(step / 4) * 4
            columns = flat_factor.index_select(0, pick + offsets)[:, :used].unsqueeze(2).unbind()
            for image, column, out in zip(images, columns, outs, strict=True):
                times_row(image[:, :used], column, out)
            kernel.sub_(product)
        kernel.mul_(gain.rsqrt().unsqueeze(1))
        factor[:, :, step] = kernel
        left.sub_(kernel.square())
    return _filled(torch.stack(picks, 1), torch.stack(gains, 1) > 0, weights)


def _filled(picks: torch.Tensor, gained: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Put the tokens of most weight in the place of picks that gained nothing, (B, num_keep)."""
    num_keep = picks.shape[1]
    rank = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    before = torch.arange(num_keep, device=picks.device) - num_keep
    rank.scatter_reduce_(1, picks, torch.where(gained, before, rank.shape[1]), "amin")
    return rank.argsort(dim=1)[:, :num_keep]
