"""HoloV: give each part of an image a share of the budget, and keep the most attended tokens of each part.

Paper: https://arxiv.org/abs/2510.02912. Training-free. Follows the released code, in which the variance of the features
cancels out of the shares: a share is that of the mean attention, and the features don't matter. Parts are runs of the
raster sequence, strips of an image. Differs from it: what a part has no room for goes to the others (there it is lost,
and zero vectors stand for it), a part of one token counts like any other, and tokens stay in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vltok.checks import check_integer
from vltok.method import register
from vltok.methods.pruning.tower import TowerSelector, pick_patches
from vltok.visual import VisualTokens


def share_budget(scores: Sequence[float], num_keep: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Share a budget among parts in proportion to their scores, and never more to a part than it has tokens.

    Each part gets its share rounded down; what is missing goes one each to the parts of the highest scores. What a part
    has no room for is shared among the others in the same way, equally where all their scores are 0.

    Args:
        scores: Of each part, at least 0.
        num_keep: The budget.
        sizes: Tokens of each part, at least `num_keep` together. None stands for parts without end, as released.

    Returns:
        The share of each part; together they are `num_keep`. Equal scores go to the lowest index.

    Raises:
        ValueError: If the parts have fewer tokens than are to be kept.
    """
    sizes = [num_keep] * len(scores) if sizes is None else sizes
    if sum(sizes) < num_keep:
        raise ValueError(f"parts of {list(sizes)} tokens have no room for num_keep={num_keep}; keep fewer")
    quota = [0] * len(scores)
    while missing := num_keep - sum(quota):
        room = [part for part, size in enumerate(sizes) if quota[part] < size]
        total = math.fsum(scores[part] for part in room)
        share = {part: scores[part] / total if total > 0 else 1 / len(room) for part in room}
        more = {part: math.floor(share[part] * missing) for part in room}
        for part in sorted(room, key=lambda part: -share[part])[: missing - sum(more.values())]:
            more[part] += 1
        for part in room:
            quota[part] = min(sizes[part], quota[part] + more[part])
    return quota


def select_by_strips(attention: torch.Tensor, num_keep: int, num_strips: int) -> torch.Tensor:
    """Pick the most attended tokens of each strip of an image, as many as its share of the attention pays for.

    Args:
        attention: (B, N), -inf where a token stands for no patch.
        num_keep: How many to keep, in 1..N.
        num_strips: Runs into which an image's patches are cut, at least 1; the first ones are one longer where this
            doesn't divide them. No more than it has patches.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; equal attention goes to the lowest index.

    Raises:
        ValueError: If `num_keep` is out of range, or attention is NaN or +inf.
    """

    def pick(image: int, patches: torch.Tensor) -> torch.Tensor:
        strips = attention[image, patches].tensor_split(min(num_strips, len(patches)))
        means = torch.stack([strip.double().mean() for strip in strips]).tolist()
        kept, start = [], 0
        for strip, quota in zip(strips, share_budget(means, num_keep, [len(strip) for strip in strips]), strict=True):
            kept.append(start + strip.argsort(descending=True, stable=True)[:quota])
            start += len(strip)
        return torch.cat(kept)

    return pick_patches(attention, num_keep, pick)


@register("holov")
@dataclass(frozen=True)
class HoloV(TowerSelector):
    """Keep the most attended visual tokens of every strip of an image.

    Attributes:
        crops: Strips of an image, at least 1. None takes one for every four kept tokens, 16 at most, which are the 16
            that the released code has at 64 tokens.
    """

    crops: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None:
            check_integer("crops", self.crops, least=1)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        (attention,) = self.given(visual, "attention")
        return select_by_strips(attention, num_keep, self.crops or min(16, max(1, num_keep // 4)))
