"""DivPrune: keep visual tokens whose smallest distance to each other is as large as possible (greedy max-min).

Paper: https://arxiv.org/abs/2503.02175. Training-free. Differs from the released code: similarity is in float32
whatever the model's dtype, a token is never picked twice, a zero embedding is similar to none, and each image of a
batch gets picks of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch

from vltok.checks import check_choice
from vltok.method import register
from vltok.methods.pruning.correction import Correction, needed_by, pick_corrected
from vltok.methods.pruning.greedy import greedy_order
from vltok.methods.pruning.selector import Selector
from vltok.visual import Need, VisualTokens


def max_min_order(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Pick first the token whose nearest neighbour is farthest, then always the one farthest from all picked.

    Distance is 1 - cosine. The farthest from all picked is the one whose largest cosine with a picked token is
    smallest.

    Args:
        tokens: Visual tokens, (B, N, D), any float dtype.
        num_keep: How many to keep per image, in 1..N.
        weights: What the distances of each token count, (B, N), at least 0; None for 1.

    Returns:
        Picks in the order they were made, (B, num_keep), int64; ties go to the lowest index.

    Raises:
        ValueError: If `num_keep` is outside 1..N, or an embedding is NaN or infinite.
    """
    return greedy_order(tokens, num_keep, start=None, score="max", weights=weights)


def select_max_min(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Like `max_min_order`, with the kept positions ascending."""
    return max_min_order(tokens, num_keep, weights).sort(dim=1).values


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Selector):
    """Keep visual tokens that are far from each other (greedy max-min of the cosine distance).

    Attributes:
        correction: "centred" measures distances without what all tokens of the image have in common, "standardised" by
            features of the vision tower, each channel at mean 0 and variance 1, see
            `vltok.methods.pruning.correction`.
    """

    correction: Correction | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("correction", self.correction, (None, *get_args(Correction)))

    @property
    def needs(self) -> tuple[Need, ...]:
        return needed_by(self.correction)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        return pick_corrected(
            visual, num_keep, self.correction, lambda _, tokens, weights: select_max_min(tokens, num_keep, weights)
        )
