"""Pure helpers on token sequences: how many to keep, how to pick rows and how to put them back."""

from __future__ import annotations

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


def gather_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick rows of each sample: tokens (B, N, ...), indices (B, K) -> (B, K, ...)."""
    index = indices.reshape(*indices.shape, *[1] * (tokens.dim() - 2))
    return tokens.gather(1, index.expand(*indices.shape, *tokens.shape[2:]))
