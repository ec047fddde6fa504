"""Cuts the grid of an image into regions that each have a share of the budget."""

from __future__ import annotations

from dataclasses import replace

import torch

from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid, Grid3
from vltok.visual import VisualTokens

# What `VisualTokens` has for each token, (B, N, ...).
_OF_TOKENS = ("embeddings", "attention", "is_overview", "coordinates", "features", "keys", "clip_image")


def check_grid(grid: Grid3 | None) -> None:
    """Raise UnsupportedInputError if tokens form no grid that is known, and so can't be cut into regions."""
    if grid is None:
        raise UnsupportedInputError(
            "the visual tokens of this image form no grid, as those of AnyRes layouts, so they can't be cut into "
            "regions; leave out regions="
        )


def region_places(visual: VisualTokens, regions: Grid) -> list[torch.Tensor]:
    """Say which tokens are in each region, (n,) each, ascending; tokens behind the grid are in the last one.

    Args:
        visual: Visual tokens that form a grid; all frames of a video are cut alike.
        regions: Regions along height and width; as many as there are rows and columns, where these are fewer.

    Raises:
        UnsupportedInputError: If they form no grid that is known.
    """
    check_grid(visual.grid)
    _, height, width = visual.grid
    down, across = min(regions[0], height), min(regions[1], width)
    numbers = region_numbers(visual.coordinates[0], height, width, (down, across))
    return [(numbers == each).nonzero().squeeze(1) for each in range(down * across)]


def region_numbers(
    coordinates: torch.Tensor, height: int | torch.Tensor, width: int | torch.Tensor, regions: Grid
) -> torch.Tensor:
    """Cut grids into regions as equal as they can be, and say which one each token is in.

    Args:
        coordinates: Frame, row and column of each token, (..., 3), int64; -1 behind the grid.
        height: Rows of the grid, one number or one for each token, (...).
        width: Columns of the grid, in the same way.
        regions: Regions along height and width.

    Returns:
        (...), int64, row by row of the regions, the same for all frames. Tokens behind the grid are in the last one.
    """
    down, across = regions
    _, row, column = coordinates.unbind(-1)
    number = row * down // height * across + column * across // width
    return torch.where(row < 0, down * across - 1, number)


def region_quotas(sizes: list[int], num_keep: int) -> list[int]:
    """Give regions equal shares of a budget, none more than it has; shares that are left go round again.

    Shares that don't come out even go to regions at even distances.
    """
    level = max(count for count in range(num_keep + 1) if sum(min(size, count) for size in sizes) <= num_keep)
    quotas = [min(size, level) for size in sizes]
    room = [number for number, size in enumerate(sizes) if size > level]
    more = num_keep - sum(quotas)
    for number in range(more):
        quotas[room[number * len(room) // more]] += 1
    return quotas


def part_of(visual: VisualTokens, places: torch.Tensor) -> VisualTokens:
    """Some of the visual tokens, (n,), of all images."""
    values = {name: getattr(visual, name) for name in _OF_TOKENS}
    own = {name: each[:, places] for name, each in values.items() if each is not None}
    return replace(visual, **own, grid=None)
