"""Keeps the best-ranked tokens: of images alone, or of every image of a row, among words and with own budgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def select_top(scores: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Pick the tokens of the highest scores.

    Args:
        scores: (B, N); -inf goes last.
        num_keep: How many to keep, in 1..N.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; equal scores go to the lowest index.

    Raises:
        ValueError: If `num_keep` is outside 1..N, or a score is NaN.
    """
    if not 1 <= num_keep <= scores.shape[1]:
        raise ValueError(f"num_keep must be in 1..{scores.shape[1]} (the visual tokens), got {num_keep}")
    if scores.isnan().any():
        raise ValueError(
            "the attention that ranks visual tokens holds NaN; check the image's pixels and the vision tower's dtype"
        )
    order = scores.argsort(dim=1, descending=True, stable=True)  # unlike topk, the same for ties on every device
    return order[:, :num_keep].sort(dim=1).values


def keep_top(
    scores: torch.Tensor,
    images: torch.Tensor,
    budgets: Sequence[Sequence[int]],
    regions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the tokens of each image that have the highest scores.

    With regions, each gets an equal share of the image's budget: they take turns, each with its best token that is
    left, and the last round, if it is not whole, goes to the highest scores. A region that has no more tokens leaves
    its turns to the others.

    Args:
        scores: (N, S). Those of tokens of no image aren't looked at.
        images: The image that a token is of, counted from 0 in each row, (N, S), int64; -1 for other tokens.
        budgets: How many tokens of each image to keep, for each row; one with fewer tokens keeps them all.
        regions: The region of its image that a token is in, at least 0, (N, S), int64.

    Returns:
        What stays, (N, S), bool: all tokens of no image, and exactly the budget of each image. Equal scores go to the
        lowest index.

    Raises:
        ValueError: If a score is NaN.
    """
    is_visual = images >= 0
    if (scores.isnan() & is_visual).any():
        raise ValueError(
            "the attention that ranks visual tokens holds NaN; check the image's pixels and the model's dtype"
        )
    order = scores.masked_fill(~is_visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
    if regions is not None:
        turn = rank_within(images * (regions.amax() + 1) + regions, order)
        order = order.gather(1, turn.gather(1, order).argsort(dim=1, stable=True))
    return ~is_visual | (rank_within(images, order) < of_tokens(budgets, images))


def rank_within(groups: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Say which of its group each token is, counted from 0 in an order of all tokens.

    Args:
        groups: The group of each token, (N, S), int64.
        order: All tokens of each row, the first one first, (N, S), int64.

    Returns:
        (N, S), int64.
    """
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    sorted_groups = groups.gather(1, order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[:, 1:] = sorted_groups.diff(dim=1) != 0
    first = torch.where(begins, places, 0).cummax(1).values
    return torch.empty_like(order).scatter(1, order, places - first)


def of_tokens(values: Sequence[Sequence[int]], images: torch.Tensor) -> torch.Tensor:
    """Look up a number of each image, by row, for its tokens, (N, S), int64; any number for tokens of no image."""
    width = max(1, *map(len, values))
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in values], device=images.device)
    return table.gather(1, images.clamp(min=0))
