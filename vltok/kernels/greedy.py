"""Greedy picks of items that are least alike, from how alike all are: after the products, all of the selection.

`follow` says what is picked: a few operations of torch on N numbers per pick. On CUDA devices its Triton twin makes all
picks of an image in one program, so that nothing is launched per pick. The twin has run in Triton's interpreter and
compiles; it has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal

import torch

Score = Literal["sum", "max"]
RowOf = Callable[[torch.Tensor], torch.Tensor]
LONGEST = 2**14  # items of a set whose scores a Triton program holds in registers


def pick_apart(
    alike: torch.Tensor, first: torch.Tensor, num_keep: int, score: Score, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Pick again and again the item that is least like those picked before.

    On CUDA devices with Triton this is one launch for sets of at most 16,384 items, else the loop of `follow`. The host
    waits for the device in neither.

    Args:
        alike: How alike the items of each of B sets are, (B, N, N), float32, contiguous: row i is how much all are like
            i, +inf at i itself, so that nothing is picked twice.
        first: The first pick of each set, (B,), int64, in 0..N - 1; not checked.
        num_keep: Picks per set, in 1..N; not checked.
        score: How much an item is like those picked: the "sum" over them, or the largest, "max".
        scale: What 1 - likeness of each item counts, (B, N), float32, above 0; None for 1. It is summed up or that of
            the most alike.

    Returns:
        Picks in the order they were made, (B, num_keep), int64; ties go to the lowest index.
    """
    twin = _twin(alike)
    if twin is not None:
        return twin.pick_apart(alike, first, num_keep, score, scale)
    return follow(rows_of(alike), first, num_keep, score, scale)


def rows_of(matrices: torch.Tensor) -> RowOf:
    """Read rows of B matrices, (B, N, N), contiguous: a function from an index each, (B,), to copies, (B, N)."""
    batch, length, _ = matrices.shape
    rows = matrices.view(-1, length)
    if batch == 1:
        return lambda index: rows.index_select(0, index)
    offsets = torch.arange(batch, device=rows.device) * length
    return lambda index: rows.index_select(0, index + offsets)


def follow(
    row_of: RowOf, first: torch.Tensor, num_keep: int, score: Score, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """What `pick_apart` computes, where `row_of` gives the rows (B, N) at (B,); they may be lost at its next call."""
    fold = torch.Tensor.add_ if score == "sum" else torch.Tensor.clamp_min_  # in place, the larger of two numbers
    pick = first.long()
    picks, total = [pick], None
    for step in range(1, num_keep):
        row = row_of(pick)
        # +inf stays +inf, so no item is picked twice.
        total = row.clone() if total is None else fold(total, row)
        nearness = total if scale is None else (total - (step if score == "sum" else 1)) * scale
        pick = nearness.argmin(1)  # documented to return the first of equal values, on any device
        picks.append(pick)
    return torch.stack(picks, 1)


def _twin(alike: torch.Tensor) -> ModuleType | None:
    """The module of the Triton twin where it can run and is installed."""
    if alike.device.type != "cuda" or alike.shape[1] > LONGEST:
        return None
    try:
        from vltok.kernels import greedy_triton
    except ImportError:
        return None
    return greedy_triton
