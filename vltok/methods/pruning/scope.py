"""SCOPE: keep tokens that cover the others best, where attended ones count more.

Paper: https://arxiv.org/abs/2510.24214. Training-free. Differs from the released code: similarity is in float32, a
token is never picked twice, a zero feature covers none (there it makes all picks arbitrary), and all tiles of an image
have a common budget unless `per="tile"`. Attention is a mean over the heads, not a sum: as a factor of all gains the
number of heads changes no pick. The released option that adds attention to the gain is left out, as there it would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vltok.checks import is_number
from vltok.method import register
from vltok.methods.pruning import greedy
from vltok.methods.pruning.covering import cover_greedily
from vltok.methods.pruning.tower import TowerSelector
from vltok.visual import Need, VisualTokens


def cover_order(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor) -> torch.Tensor:
    """Pick again and again the token that adds most to how well all are covered, times its weight.

    A token is covered by its largest cosine with a picked one, at least 0; what a pick adds is summed over all tokens.

    Args:
        tokens: (B, N, D), any float dtype; the cosine is in float32.
        num_keep: How many to keep per image, in 1..N.
        weights: (B, N), at least 0, or -inf for tokens that come after all others.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index.

    Raises:
        ValueError: If `num_keep` is out of range, a weight is NaN, +inf or negative, or a token is NaN or infinite.
    """
    length = tokens.shape[1]
    if not 1 <= num_keep <= length:
        raise ValueError(f"num_keep must be in 1..{length} (the visual tokens), got {num_keep}")
    if not (((weights >= 0) & (weights < math.inf)) | (weights == -math.inf)).all():
        raise ValueError("the weights of visual tokens must be numbers of at least 0, or -inf; some are not, or NaN")
    greedy.check_usable(tokens)
    group = max(1, greedy.GRAM_ENTRIES // length**2)
    picks = [
        cover_greedily(greedy.cosine_matrix(part), num_keep, weight)
        for part, weight in zip(tokens.split(group), weights.detach().float().split(group), strict=True)
    ]
    return torch.cat(picks)


@register("scope")
@dataclass(frozen=True)
class SCOPE(TowerSelector):
    """Keep visual tokens that are attended to and like as many others as possible that none kept is like.

    Attributes:
        alpha: Exponent of the attention, at least 0; 0 looks at coverage alone.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha) or not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("features",)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        attention, features = self.given(visual, "attention", "features")
        weights = torch.where(attention.isfinite(), attention.clamp_min(0) ** self.alpha, attention)
        return cover_order(features, num_keep, weights).sort(dim=1).values
