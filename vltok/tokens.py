"""Pure helpers on token sequences: how many to keep, how to pick rows and how to put them back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

Grid = tuple[int, int]  # rows and columns, (H, W), of tokens laid out on a picture
Grid3 = tuple[int, int, int]  # frames, rows and columns, (T, H, W), of those of a video; an image has one frame


def keep_count(num_tokens: int, keep_ratio: float | None = None, num_keep: int | None = None) -> int:
    """Say how many of `num_tokens` visual tokens a budget keeps.

    Args:
        num_tokens: Visual tokens of one image, N.
        keep_ratio: Share to keep, in (0, 1]; rounded half to even, at least one token.
        num_keep: Count to keep, at least 1: an upper bound, all of fewer tokens are kept. Exactly one of the two is
            given.

    Returns:
        The count, in 1..N.
    """
    return max(1, round(keep_ratio * num_tokens)) if num_keep is None else min(num_keep, num_tokens)


def share_of(count: int, share: float) -> int:
    """Say how many a share of a count is, rounded down; a product such as 0.29 * 100 lies below what it means."""
    return math.floor(share * count + 1e-6)


def gather_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick rows of each sample: tokens (B, N, ...), indices (B, K) -> (B, K, ...)."""
    index = indices.reshape(*indices.shape, *[1] * (tokens.dim() - 2))
    return tokens.gather(1, index.expand(*indices.shape, *tokens.shape[2:]))


def patches_left(num_patches: int, merges: Iterable[int]) -> int:
    """Say how many patches are left of a picture where block after block merges so many, at most half of them."""
    for count in merges:
        num_patches -= min(count, num_patches // 2)
    return num_patches


def mean_by_group(tokens: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Average the tokens of every group, weighted by how many each stands for.

    Args:
        tokens: (B, N, C), any float dtype.
        groups: The group of each token, (B, N), in 0..num_groups - 1, none of which is empty.
        sizes: How many tokens each stands for, (B, N), float32.
        num_groups: Groups, G.

    Returns:
        The means, (B, G, C), made in float32, in the dtype of the tokens. A token alone in its group is the same bit
        for bit. Gradients flow to all tokens. On GPUs more than two are added up in any order, unless
        torch.use_deterministic_algorithms() forbids it.
    """
    total = sizes.new_zeros(len(sizes), num_groups).scatter_add(1, groups, sizes)
    wide = tokens.to(torch.promote_types(tokens.dtype, sizes.dtype))
    share = sizes.to(wide.dtype) / total.to(wide.dtype).gather(1, groups)
    parts = wide * share.unsqueeze(-1)
    mean = parts.new_zeros(len(parts) * num_groups, parts.shape[-1])
    mean = mean.index_add(0, _numbered(groups, num_groups), parts.flatten(0, 1))
    return mean.unflatten(0, (len(parts), num_groups)).to(tokens.dtype)


def spread_to_group(means: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Give every token what there is for its group: (B, G, C), groups (B, N) -> (B, N, C)."""
    rows = means.flatten(0, 1).index_select(0, _numbered(groups, means.shape[1]))
    return rows.unflatten(0, groups.shape)


def _numbered(groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Groups of a batch numbered throughout, (B * N,). Picking rows of one matrix takes a fraction of gather's time."""
    return (groups + torch.arange(len(groups), device=groups.device).unsqueeze(1) * num_groups).flatten()
