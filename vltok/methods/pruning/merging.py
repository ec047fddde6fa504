"""Averages the tokens that are dropped into the kept ones that are most like them."""

from __future__ import annotations

import torch

from vltok.methods.pruning.greedy import float32_products


def nearest_kept(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Say which kept token each token is most like; a kept one is its own.

    Args:
        tokens: Visual tokens, (B, N, D). Similarity is the cosine in float32.
        indices: Kept positions, (B, K).

    Returns:
        Numbers of kept tokens, (B, N), int64; ties go to the first.
    """
    rows = []
    with torch.no_grad(), float32_products(tokens), torch.autocast(tokens.device.type, enabled=False):
        for own, kept in zip(tokens, indices, strict=True):  # image by image: a row doesn't depend on the batch
            unit = torch.nn.functional.normalize(own.float(), dim=-1)
            nearest = (unit @ unit[kept].T).argmax(1)
            nearest[kept] = torch.arange(len(kept), device=kept.device)
            rows.append(nearest)
    return torch.stack(rows) if rows else indices.new_zeros(tokens.shape[:2])


def merge_into_kept(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Average each kept token with the dropped ones that are more like it than like any other kept one.

    Args:
        tokens: Visual tokens, (B, N, D), any float dtype.
        indices: Kept positions, (B, K).

    Returns:
        What the kept tokens are then, (B, K, D), in the dtype of the tokens: means over all that went into each, made
        in float32. Gradients flow to all tokens.
    """
    batch, _, width = tokens.shape
    count = indices.shape[1]
    owner = nearest_kept(tokens, indices)
    total = tokens.new_zeros(batch, count, width, dtype=torch.float32)
    total = total.scatter_add(1, owner.unsqueeze(-1).expand_as(tokens), tokens.float())
    sizes = torch.zeros(batch, count, device=tokens.device).scatter_add(
        1, owner, torch.ones_like(owner, dtype=torch.float32)
    )
    return (total / sizes.unsqueeze(-1)).to(tokens.dtype)
