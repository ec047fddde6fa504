"""Rows and columns of a softmax attention, exact and without the N x N map."""

from __future__ import annotations

import torch


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.float().unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (..., S, C) -> (..., H, S, C / H)


def cls_attention(query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Attention of one query row, a = softmax(scale q K^T), mean over the heads.

    Args:
        query: The projected query row, (B, 1, C).
        key: The projected keys, (B, S, C).
        num_heads: Attention heads, H; C is divisible by it.
        scale: Factor of the logits, usually (C / H) ** -0.5.

    Returns:
        Attention, (B, S), float32; each row sums to 1.
    """
    logits = _heads(query, num_heads) @ _heads(key, num_heads).mT * scale  # (B, H, 1, S)
    return logits.softmax(-1).mean(1).squeeze(1)


def received_attention(
    query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float, chunk: int = 256
) -> torch.Tensor:
    """Attention every key receives, the mean over all queries and heads.

    Args:
        query: Projected queries, (B, S, C).
        key: Projected keys, (B, S, C).
        num_heads: Attention heads, H.
        scale: Factor of the logits.
        chunk: Queries taken at a time; peak memory is B * H * chunk * S floats.

    Returns:
        Attention received, (B, S), float32; each row sums to 1.
    """
    keys = _heads(key, num_heads).mT
    total = key.new_zeros(key.shape[0], key.shape[1], dtype=torch.float32)
    for rows in query.split(chunk, dim=1):
        total += (_heads(rows, num_heads) @ keys * scale).softmax(-1).sum(dim=(1, 2))
    return total / (num_heads * query.shape[1])


def indicator_values(columns: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values that make an attention layer return how much each query attends to groups of keys.

    With the c-th value channel 1 on the keys of group c and 0 elsewhere, the attention output's c-th channel is the
    query's attention mass on that group: exact for any mask, rotary embedding or attention kernel.

    Args:
        columns: Which keys belong to which group, (B, S, G), bool; G <= head_dim.
        num_heads: Key-value heads.
        head_dim: Width of a head.
        dtype: The dtype the layer computes in.

    Returns:
        What to put in the place of the value projection's output, (B, S, num_heads * head_dim).

    Raises:
        ValueError: If there are more groups than value channels.
    """
    batch, length, groups = columns.shape
    if groups > head_dim:
        raise ValueError(f"{groups} groups of keys don't fit into {head_dim} value channels; give at most {head_dim}")
    values = columns.new_zeros(batch, length, num_heads, head_dim, dtype=dtype)
    values[..., :groups] = columns.unsqueeze(2)
    return values.flatten(2)


def attention_mass(output: torch.Tensor, head_dim: int, groups: int) -> torch.Tensor:
    """Read the attention mass out of what attention returned for `indicator_values`.

    Args:
        output: Concatenated head outputs before the output projection, (B, S, H * head_dim).
        head_dim: Width of a head.
        groups: Number of groups, G.

    Returns:
        Share of each query's attention on each group, mean over the query heads, (B, S, G), float32.
    """
    return output.unflatten(-1, (-1, head_dim))[..., :groups].float().mean(2)
