"""Pool: average the visual tokens of every cell of a coarser grid: the floor for methods that merge tokens.

Paper: https://arxiv.org/abs/2405.20985 (DeCo), whose adaptive average pooling stands before a projector that is trained
with it. Training-free. Differs from the paper: it stands behind the projector, at any budget, on a grid of any shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vltok.errors import UnsupportedInputError
from vltok.method import register
from vltok.methods.pruning.selector import Selector
from vltok.tokens import Grid, Grid3, keep_count
from vltok.visual import Selection, VisualTokens


def pool_shape(grid: Grid, num_cells: int) -> Grid:
    """Say into how many rows and columns of cells a grid is pooled: as many as allowed, cells about square.

    Cells are as high as they are wide, up to one row or column more or less.

    Args:
        grid: Rows and columns of tokens, (H, W).
        num_cells: The most cells, at least 1.

    Returns:
        Rows and columns of cells, (s, t), s * t at most `num_cells`. It is the same for `num_cells` = s * t.
    """
    height, width = grid
    slack = max(grid)  # a row more is worth W, a column more H
    shapes = []
    for rows in range(1, min(height, num_cells) + 1):
        columns = min(width, num_cells // rows, (rows * width + slack) // height)
        if columns * height >= rows * width - slack:
            shapes.append((rows, columns))

    def merit(shape: Grid) -> tuple[int, float]:
        cell = shape[0] * width, shape[1] * height  # its width to its height, as integers
        return shape[0] * shape[1], -max(cell) / min(cell)

    return max(shapes, key=merit)  # of equals the one with fewer rows


def pool_grid(tokens: torch.Tensor, grid: Grid3, cells: Grid3) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the tokens of each cell, as `torch.nn.functional.adaptive_avg_pool3d` does.

    Cell i of s over H rows has the rows from floor(i * H / s) to before ceil((i + 1) * H / s): where s doesn't divide
    H, neighbours share a row.

    Args:
        tokens: Tokens of B grids, (B, T * H * W, D), any float dtype.
        grid: Frames, rows and columns, (T, H, W).
        cells: Frames, rows and columns of cells, none more than of tokens.

    Returns:
        The position of the token nearest to the middle of each cell, (K,), ascending, int64, of two the lower one; and
        the means, (B, K, D), made in float32, in the dtype of the tokens. Gradients flow to all tokens.
    """
    flat = torch.zeros((), dtype=torch.int64, device=tokens.device)
    for size, count in zip(grid, cells, strict=True):
        index = torch.arange(count, device=tokens.device)
        middle = (index * size // count - (-(index + 1) * size // count) - 1) // 2
        flat = flat.unsqueeze(-1) * size + middle
    volume = tokens.float().unflatten(1, grid).movedim(-1, 1)  # (B, D, T, H, W)
    means = torch.nn.functional.adaptive_avg_pool3d(volume, cells)
    return flat.flatten(), means.flatten(2).mT.to(tokens.dtype)


@register("pool")
@dataclass(frozen=True)
class Pool(Selector):
    """Average the visual tokens of every cell of a coarser grid, as many cells as the budget pays for.

    A mean stands where the middle of its cell was. Frames of a video are pooled each by itself; if there is less than a
    token for each frame, whole frames are averaged, too. Tokens behind the grid, such as a newline, stay and count, as
    long as there is room for them beside one cell.
    """

    @property
    def merges(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge is not None or self.regions is not None:
            name = "merge" if self.merge is not None else "regions"
            raise ValueError(f"Pool averages all tokens over the whole grid by itself; leave out {name}")

    def budget(self, num_tokens: int, grid: Grid3 | None, kind: Literal["image", "video"]) -> int:
        cells, behind = _layout(num_tokens, grid, keep_count(num_tokens, self.keep_ratio, self.num_keep))
        return math.prod(cells) + behind

    def select(self, visual: VisualTokens, num_keep: int) -> Selection:
        batch, length, _ = visual.embeddings.shape
        cells, behind = _layout(length, visual.grid, num_keep)
        if math.prod(cells) + behind != num_keep:
            raise ValueError(f"a grid {visual.grid} has no {num_keep - behind} cells; ask Pool.budget() how many")
        inside = math.prod(visual.grid)
        kept, means = pool_grid(visual.embeddings[:, :inside], visual.grid, cells)
        kept = torch.cat([kept, torch.arange(inside, inside + behind, device=kept.device)])
        means = torch.cat([means, visual.embeddings[:, inside : inside + behind]], 1)
        return Selection(kept.expand(batch, -1), means)


def _layout(num_tokens: int, grid: Grid3 | None, num_keep: int) -> tuple[Grid3, int]:
    """Frames, rows and columns of cells, and how many tokens behind the grid stay.

    Raises:
        UnsupportedInputError: If the tokens form no grid.
    """
    if grid is None:
        raise UnsupportedInputError(
            "Pool averages neighbours in the grid of visual tokens, and those of this image or video form none that is "
            "known, as in AnyRes layouts; use another method, such as StrideTokens"
        )
    frames, *sides = grid
    behind = min(num_tokens - math.prod(grid), num_keep - 1)
    each = (num_keep - behind) // frames
    return ((frames, *pool_shape((sides[0], sides[1]), each)) if each else (num_keep - behind, 1, 1)), behind
