"""Where pictures are among the tokens of a vision tower: one grid for all, or pictures of any grids side by side.

a grid       every row of tokens is one picture, and all have this grid
SideBySide   rows are padded, or hold several pictures. Two pictures of 1 x 2 and one of 2 x 2 patches in two rows:

    tokens   a a b b      grid (1, 2): rows [[0], [0]], columns [[0, 1], [2, 3]]
             c c c c      grid (2, 2): rows [[1]], columns [[0, 1, 2, 3]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vltok.tokens import Grid


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one grid: the p-th has the tokens [rows[p], columns[p]].

    Attributes:
        grid: Patches of each, (H, W).
        rows: (P, 1), int64.
        columns: (P, H * W), int64, row by row of the grid.
    """

    grid: Grid
    rows: torch.Tensor
    columns: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of what there is for each token: (B, N, ...) -> (P, H * W, ...)."""
        return x[self.rows.to(x.device), self.columns.to(x.device)]


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Pictures of any grids; tokens of none are padding.

    Attributes:
        size: Rows and columns of the tokens, (B, N).
        groups: The pictures, by their grids.
    """

    size: tuple[int, int]
    groups: tuple[Pictures, ...]

    def changed(self, tokens: torch.Tensor, change: Callable[[torch.Tensor, Grid], torch.Tensor]) -> torch.Tensor:
        """Put what `change` makes of the pictures, (P, H * W, C), in their places; padding stays as it is."""
        for group in self.groups:
            places = group.rows.to(tokens.device), group.columns.to(tokens.device)
            tokens = tokens.index_put(places, change(group.of(tokens), group.grid))
        return tokens


Layout = Grid | SideBySide


def patch_grid(config: Any) -> Grid:
    """Patches of a picture of the size that a tower was made for, by its config: (H, W)."""
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    return size[0] // patch[0], size[1] // patch[1]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Place:
    """Where one picture is.

    Attributes:
        row: Row of the tokens.
        first: Column of its first patch.
        step: Columns from one row of its patches to the next.
        grid: Its patches, (H, W).
    """

    row: int
    first: int
    step: int
    grid: Grid


def layout_at(size: tuple[int, int], places: Iterable[Place]) -> Layout:
    """The layout of pictures in these places among tokens of this size, (B, N): a grid, where one says it all."""
    by_grid: dict[Grid, list[Place]] = {}
    for place in places:
        if place.grid[0] * place.grid[1]:
            by_grid.setdefault(place.grid, []).append(place)
    if len(by_grid) == 1:
        ((height, width), own), *_ = by_grid.items()
        if len(own) == size[0] and height * width == size[1]:
            return height, width
    return SideBySide(size, tuple(_pictures(grid, own) for grid, own in by_grid.items()))


def _pictures(grid: Grid, places: list[Place]) -> Pictures:
    rows = torch.tensor([[place.row] for place in places])
    first = torch.tensor([place.first for place in places]).view(-1, 1, 1)
    step = torch.tensor([place.step for place in places]).view(-1, 1, 1)
    columns = first + step * torch.arange(grid[0]).view(1, -1, 1) + torch.arange(grid[1])
    return Pictures(grid, rows, columns.flatten(1))
