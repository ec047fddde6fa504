"""Says of visual tokens what was read of the patches they stand for: attention, keys, features.

A token stands for a square of m x m patches of a picture, and gets their mean. With m = 2, patches that a tower has
row by row, and patches that it has block by block:

    rows       0  1  2  3      blocks     0  1  4  5      tokens     0  1
               4  5  6  7                 2  3  6  7
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid3

# How a tower has its patches: row by row, or those of one token one after another; or so, and window by window.
Order = Literal["rows", "blocks", "windows"]


def by_picture(values: torch.Tensor, grids: Sequence[Grid3], has_padding: bool) -> list[tuple[torch.Tensor, Grid3]]:
    """Cut what was read in a tower into pictures as the tower has them, each with its grid (T, H, W).

    Args:
        values: All pictures in one row, (1, patches, ...), or a row for each, or for each frame, (R, S, ...).
        grids: Patches of each picture.
        has_padding: Whether rows may be longer than pictures. Else what is longer begins with tokens such as [CLS].

    Raises:
        UnsupportedInputError: If the grids are not those of what the tower saw.
    """
    counts = [math.prod(grid) for grid in grids]
    if len(values) == 1 and sum(counts) == values.shape[1]:
        return list(zip(values[0].split(counts), grids, strict=True))
    frames = [(1, height, width) for count, height, width in grids for _ in range(count)]
    longest = max((height * width for _, height, width in frames), default=0)
    if len(frames) != len(values) or longest > values.shape[1]:
        raise UnsupportedInputError(
            f"the vision tower ran on {tuple(values.shape[:2])} tokens, where patches of the grids {list(grids)} were "
            "expected; choose a method that needs nothing of the vision tower"
        )
    cut = []
    for row, grid in zip(values, frames, strict=True):
        count = math.prod(grid)
        cut.append((row[:count] if has_padding else row[len(row) - count :], grid))
    return cut


def fold(values: torch.Tensor, grid: Grid3, merge: int, order: Order) -> torch.Tensor:
    """Mean over the patches of each token of a picture, (T * H * W, ...) -> (T, tokens of a frame, ...).

    Raises:
        UnsupportedInputError: If squares of `merge` x `merge` patches don't fill the grid.
    """
    frames, height, width = grid
    if height % merge or width % merge:
        raise UnsupportedInputError(
            f"squares of {merge} x {merge} patches don't fill an image of {height} x {width}, so it is not known "
            "which a visual token stands for; choose a method that needs nothing of the vision tower"
        )
    rest = values.shape[1:]
    if order != "rows":
        return values.reshape(frames, -1, merge**2, *rest).mean(2)
    return values.reshape(frames, height // merge, merge, width // merge, merge, *rest).mean((2, 4)).flatten(1, 2)


def token_values(
    pictures: Sequence[tuple[torch.Tensor, Grid3]], merges: Sequence[int], order: Order, count: int, fill: float
) -> torch.Tensor:
    """What was read, for visual tokens, (V, ...): of all frames of all pictures, or with frames of a picture pooled.

    Where pictures have more tokens than patches, these come first, as a [CLS] that is left in does: they get `fill`.

    Args:
        pictures: Values and grid of each picture.
        merges: Patches along the side of a token, for each.
        order: The tower's.
        count: Tokens that the language model gets, V.
        fill: What tokens get that stand for no patch.

    Raises:
        UnsupportedInputError: If these are not V.
    """
    folded = [fold(values, grid, merge, order) for (values, grid), merge in zip(pictures, merges, strict=True)]
    each = sum(len(values) * values.shape[1] for values in folded)
    if count != each and count == sum(values.shape[1] for values in folded):
        folded = [values.mean(0, keepdim=True) for values in folded]
    elif 0 < each < count and (count - each) % len(folded) == 0:
        more = (count - each) // len(folded)
        folded = [
            torch.cat([values.new_full((len(values), more, *values.shape[2:]), fill), values], 1) for values in folded
        ]
    elif count != each:
        raise UnsupportedInputError(
            f"the projector returns {count} tokens for {each} places of patches; what was read of patches can't be "
            "matched with them; choose a method that needs nothing of the vision tower"
        )
    return torch.cat([values.flatten(0, 1) for values in folded]) if folded else torch.zeros(0)
