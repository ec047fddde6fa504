"""FastV: keep the visual tokens that the prompt's last token attends to most in an early decoder layer.

Paper: https://arxiv.org/abs/2403.06764; the windows are those of https://arxiv.org/abs/2502.11501. Training-free.
Differs from the released code, which reads one map of a whole attention and takes the first sample's picks for the
whole batch: each sample has its own, and only one row of its attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vltok.checks import check_regions
from vltok.method import register
from vltok.methods.pruning.ranking import keep_top, of_tokens
from vltok.methods.pruning.regions import region_numbers
from vltok.methods.pruning.rule import RuleAtLayer
from vltok.tokens import Grid, Grid3
from vltok.visual import DecoderState


def regions_of(
    coordinates: torch.Tensor, images: torch.Tensor, grids: Sequence[Sequence[Grid3 | None]], window: Grid
) -> torch.Tensor:
    """Cut the grid of each image into h x w regions as equal as they can be, and say which one a token is in.

    Args:
        coordinates: Frame, row and column of each token, (N, S, 3), int64; -1 behind the grid.
        images: The image of each token, counted from 0 in each row, (N, S), int64; -1 for other tokens.
        grids: Frames, rows and columns of each image, for each row.
        window: Regions from top to bottom and from left to right, (h, w).

    Returns:
        (N, S), int64, in 0..h * w - 1, the same for all frames of a video. Tokens behind the grid are in the last one.

    Raises:
        ValueError: If the grid of an image isn't known.
    """
    if any(grid is None for row in grids for grid in row):
        raise ValueError(
            f"window={window} needs the rows and columns that the visual tokens of each image form, and this model "
            "doesn't show them for all images; leave out window"
        )
    height, width = (of_tokens([[grid[axis] for grid in row] for row in grids], images).clamp(min=1) for axis in (1, 2))
    return region_numbers(coordinates, height, width, window)


@register("fastv")
@dataclass(frozen=True)
class FastV(RuleAtLayer):
    """Keep the visual tokens with the most attention of the prompt's last token, mean over the heads.

    Attributes:
        window: (h, w) gives each of h x w regions of an image an equal share of its budget (Window-FastV), against the
            bias of the last token to what stands right before it. None lets all tokens compete.
    """

    window: Grid | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            object.__setattr__(self, "window", check_regions("window", self.window))

    def keep(self, state: DecoderState) -> torch.Tensor:
        scores = state.attention(state.last.unsqueeze(1)).squeeze(1)
        regions = None
        if self.window is not None:
            regions = regions_of(state.coordinates, state.images, state.grids, self.window)
        return keep_top(scores, state.images, self.budgets(state), regions)
