"""Greedy maximum coverage: what SCOPE and MMTok share.

What a candidate adds shrinks as others are picked, so what it added once bounds what it adds now. Only candidates that
might still add most are looked at again; the picks are those of looking at all of them each time.
"""

from __future__ import annotations

import math

import torch

_AT_A_TIME = 32  # candidates looked at again in one go


def cover_greedily(covers: torch.Tensor, num_keep: int, weights: torch.Tensor) -> torch.Tensor:
    """Pick again and again what adds most to the sum of the best covers so far, times its weight.

    Args:
        covers: How well each of N candidates covers each of R things, (B, N, R), float32; less than 0 counts as 0.
        num_keep: How many to pick, in 1..N.
        weights: (B, N), float32, at least 0; or -inf for candidates that come after all others.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each once; ties go to the lowest index.
    """
    batch, length = weights.shape
    count = min(_AT_A_TIME, length)
    images = torch.arange(batch, device=weights.device)
    rows = covers.flatten(0, 1)
    offsets = (images * length).unsqueeze(1)  # of an image's rows among all
    scale = weights.clamp_min(0)
    covered = torch.zeros_like(covers[:, 0])
    bound = (covers.clamp_min(0).sum(2) * scale).masked_fill_(weights < 0, -1.0)  # of the gains
    known = torch.ones_like(weights, dtype=torch.bool)  # where the bound is the gain
    picks = []
    for _ in range(num_keep):
        best = bound.argmax(1)  # documented to return the first of equal values
        while not known[images, best].all():
            doubtful = bound.masked_fill(known, -math.inf).topk(count, dim=1).indices
            more = rows.index_select(0, (doubtful + offsets).flatten()).unflatten(0, (batch, count))
            gains = more.sub_(covered.unsqueeze(1)).clamp_min_(0).sum(2) * scale.gather(1, doubtful)
            # Picked candidates, at -inf, stay there.
            bound.scatter_(1, doubtful, torch.minimum(gains, bound.gather(1, doubtful)))
            known.scatter_(1, doubtful, True)
            best = bound.argmax(1)
        picks.append(best)
        covered = torch.maximum(covered, covers[images, best])
        bound[images, best] = -math.inf
        known = bound <= 0  # these can't shrink
    return torch.stack(picks, 1)
