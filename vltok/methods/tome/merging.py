"""Bipartite soft matching: which tokens of a ViT are so much alike that one can stand for both.

Paper: https://arxiv.org/abs/2210.09461 (ToMe). Training-free. Differs from the released code: tokens stay in the order
of the patches, any number of prefix tokens is protected, ties go to the lowest index, and a key of norm zero is similar
to none (there it gives NaN). `parity=True` orders tokens as released.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F

from vltok.autograd import autocast_off
from vltok.methods.pruning.greedy import float32_products
from vltok.tokens import patches_left


@torch.no_grad()
def match_tokens(keys: torch.Tensor, num_merge: int, num_prefix_tokens: int = 0, parity: bool = False) -> torch.Tensor:
    """Say which tokens become one: the most similar pairs of an even and an odd position.

    Every token at an even position looks for the one at an odd position that it is most like. The best `num_merge` of
    these pairs are merged, so that a token at an odd position may take in several.

    Args:
        keys: What tokens are compared by, (B, N, d), any float dtype. Similarity is the cosine in float32.
        num_merge: Tokens to merge away, in 0..(N - num_prefix_tokens) // 2.
        num_prefix_tokens: First tokens, such as [CLS], which are never merged.
        parity: Number what is left as released: first the tokens of even positions that stay, in order or, without
            prefix tokens, by falling similarity; then those of odd ones.

    Returns:
        The number of the token that each one goes into, (B, N), int64, in 0..N - num_merge - 1. These are numbered by
        the first position of each. Where keys are NaN, so are the tokens, and any match does: other pictures don't see
        it, and a check would make a GPU wait in every block.

    Raises:
        ValueError: If `num_merge` is out of range.
    """
    batch, length, _ = keys.shape
    most = (length - num_prefix_tokens) // 2
    if not 0 <= num_merge <= most:
        raise ValueError(
            f"num_merge must be in 0..{most}, half of {length - num_prefix_tokens} tokens, as each pair has a token of "
            f"an even position; got {num_merge}"
        )
    position = torch.arange(length, device=keys.device).expand(batch, -1)
    if num_merge == 0:
        return position.contiguous()
    precise = contextlib.nullcontext() if torch.compiler.is_compiling() else float32_products(keys)
    with autocast_off(keys), precise:
        unit = F.normalize(keys.float(), dim=-1)
        scores = unit[:, ::2] @ unit[:, 1::2].mT  # (B, even, odd)
    scores[:, : (num_prefix_tokens + 1) // 2] = -torch.inf
    scores[:, :, : num_prefix_tokens // 2] = -torch.inf
    best, partner = scores.max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged = order[:, :num_merge]  # of even positions
    target = position.scatter(1, merged * 2, partner.gather(1, merged) * 2 + 1)
    if parity:
        return _released_numbers(target, order[:, num_merge:], num_prefix_tokens)
    first = position.scatter_reduce(1, target, position, "amin").gather(1, target)
    return ((first == position).cumsum(1) - 1).gather(1, first)


def _released_numbers(target: torch.Tensor, rest: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Number the tokens that are left as released, given where each token goes, and the even ones that stay."""
    rest = rest.sort(1).values if num_prefix_tokens else rest
    order = torch.cat([rest * 2, torch.arange(1, target.shape[1], 2, device=target.device).expand(len(rest), -1)], 1)
    number = torch.arange(order.shape[1], device=target.device).expand_as(order)
    return torch.zeros_like(target).scatter(1, order, number).gather(1, target)


def merge_schedule(num_patches: int, num_blocks: int, num_keep: int) -> tuple[int, ...]:
    """Spread merging evenly over the blocks of a vision tower, so that an exact number of patches is left.

    Args:
        num_patches: Patches of a picture.
        num_blocks: Blocks that merge.
        num_keep: Patches to be left, in 1..num_patches.

    Returns:
        Patches to merge away in each block; earlier ones have what doesn't divide, and what later ones can't merge, as
        a block merges at most half of what enters it.

    Raises:
        ValueError: If so few can't be reached.
    """
    merges, left, rest = [], num_keep, num_patches - num_keep
    for block in range(num_blocks, 0, -1):
        merges.append(min(rest // block, left))
        left, rest = left + merges[-1], rest - merges[-1]
    if rest:
        raise ValueError(
            f"{num_blocks} blocks can't merge {num_patches} patches into {num_keep}, as each merges at most half of "
            f"them; keep at least {patches_left(num_patches, [num_patches] * num_blocks)}"
        )
    return tuple(reversed(merges))
