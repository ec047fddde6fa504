"""VisPruner: keep the tokens that the vision tower attends to most, and of the others those that are no duplicates.

Paper: https://arxiv.org/abs/2412.01818 (version 2). Training-free. Differs from the released code: similarity is in
float32 whatever the model's dtype (in half precision a third of the picks are noise), any number of tokens can be kept
of any number (there, an odd rest raises), and at least one token is kept for its attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.checks import check_share
from vltok.method import register
from vltok.methods.pruning.greedy import check_usable, cosine_matrix
from vltok.methods.pruning.tower import TowerSelector, pick_patches
from vltok.tokens import share_of
from vltok.visual import Need, VisualTokens

_DROPPED_A_ROUND = 8


def drop_duplicates(cosine: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Drop tokens that have a double among the others, a few each round, until enough are gone.

    Each round deals the tokens alternately into A and B, and drops those of A with the largest cosine to any of B. The
    survivors of A, in falling order of this cosine, and then B are dealt in the next round.

    Args:
        cosine: Of all tokens with all, (R, R), the most important token first: the order decides who is dealt where.
        num_keep: How many to keep, in 0..R.

    Returns:
        Kept positions, (num_keep,), in the order of the last round, int64; ties go to the lowest place in A.
    """
    left = torch.arange(len(cosine), device=cosine.device)
    if num_keep == 0:
        return left[:0]
    while len(left) > num_keep:
        a, b = left[0::2], left[1::2]
        nearest = cosine.index_select(0, a).index_select(1, b).amax(1)
        order = nearest.argsort(descending=True, stable=True)
        left = torch.cat([a[order[min(_DROPPED_A_ROUND, len(left) - num_keep) :]], b])
    return left


def select_without_duplicates(
    features: torch.Tensor, attention: torch.Tensor, num_keep: int, num_important: int
) -> torch.Tensor:
    """Pick the tokens with the most attention, and those of the rest that `drop_duplicates` leaves.

    Args:
        features: (B, N, C), any float dtype; similarity is the cosine in float32.
        attention: (B, N), -inf where a token stands for no patch.
        num_keep: How many to keep in all, in 1..N.
        num_important: How many of these by attention alone, in 0..num_keep.

    Returns:
        Kept positions, (B, num_keep), ascending, int64.

    Raises:
        ValueError: If a count is out of range, attention is NaN or +inf, or a feature is NaN or infinite.
    """
    if not 0 <= num_important <= num_keep:
        raise ValueError(f"num_important must be in 0..{num_keep} (the kept tokens), got {num_important}")
    check_usable(features)

    def pick(image: int, patches: torch.Tensor) -> torch.Tensor:
        order = attention[image, patches].argsort(descending=True, stable=True)
        important, rest = order[:num_important], order[num_important:]
        cosine = cosine_matrix(features[image : image + 1, patches[rest]])[0]
        return torch.cat([important, rest[drop_duplicates(cosine, num_keep - num_important)]])

    return pick_patches(attention, num_keep, pick)


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(TowerSelector):
    """Keep the visual tokens with the most attention, and of the others those least like each other.

    Attributes:
        important: Share of the kept tokens that are picked by attention, in 0..1, rounded down, at least one token.
    """

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("important", self.important)

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("features",)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        attention, features = self.given(visual, "attention", "features")
        return select_without_duplicates(features, attention, num_keep, max(1, share_of(num_keep, self.important)))
