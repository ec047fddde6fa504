"""PruMerge+: keep attended and evenly spread tokens, each enriched by the tokens whose keys are nearest to its own.

LLaVA-PruMerge, https://arxiv.org/abs/2403.15388. Training-free. Differs from the released code, which `adaptive_tokens`
gives: as many tokens as asked instead of as many as the attention has outliers; centres are a quarter by attention and
the rest at even distances, which is what the released rule comes to; no extra token of what is left over; attention is
that of the layer whose output is used, all its heads apart, and sums to 1 over an image; tokens stand in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vltok.checks import check_integer, check_share
from vltok.method import register
from vltok.methods.pruning.floors import select_stride
from vltok.methods.pruning.greedy import check_usable, cosine_matrix
from vltok.methods.pruning.tower import TowerMerger, mix_tokens, pick_patches
from vltok.visual import Selection, VisualTokens


def select_centres(attention: torch.Tensor, num_keep: int, num_attended: int) -> torch.Tensor:
    """Pick the tokens with the most attention, and others at even distances among the rest.

    Args:
        attention: (B, N), -inf where a token stands for no patch.
        num_keep: How many to keep in all, in 1..N.
        num_attended: How many of these by attention, in 0..num_keep.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; equal attention goes to the lowest index.

    Raises:
        ValueError: If a count is out of range, or attention is NaN or +inf.
    """
    if not 0 <= num_attended <= num_keep:
        raise ValueError(f"num_attended must be in 0..{num_keep} (the kept tokens), got {num_attended}")

    def pick(image: int, patches: torch.Tensor) -> torch.Tensor:
        order = attention[image, patches].argsort(descending=True, stable=True)
        attended, rest = order[:num_attended], order[num_attended:].sort().values
        if num_attended == num_keep:
            return attended
        return torch.cat([attended, rest[select_stride(len(rest), num_keep - num_attended, rest.device)]])

    return pick_patches(attention, num_keep, pick)


@torch.no_grad()
def neighbour_weights(
    keys: torch.Tensor, attention: torch.Tensor, centres: torch.Tensor, num_neighbours: int = 32
) -> torch.Tensor:
    """Say what each centre is made of: itself, and its nearest other tokens weighted by their attention.

    Args:
        keys: (B, N, C), any float dtype; the nearest have the largest cosine, in float32. Other centres count, too.
        attention: (B, N), -inf where a token stands for no patch, which has no part in this. Not normalised here.
        centres: Positions, (B, K).
        num_neighbours: How many are merged into a centre, at most.

    Returns:
        Weights, (B, K, N), float32; equal cosines go to the lowest index.

    Raises:
        ValueError: If a key is NaN or infinite.
    """
    check_usable(keys)
    batch, length, _ = keys.shape
    weights = torch.zeros(batch, centres.shape[1], length, device=keys.device)
    is_patch = attention > -math.inf
    for own, key, score, patch, centre in zip(weights, keys, attention, is_patch, centres, strict=True):
        cosine = cosine_matrix(key.unsqueeze(0))[0][centre].masked_fill(~patch, -math.inf)
        cosine.scatter_(1, centre.unsqueeze(1), -math.inf)
        nearest = cosine.argsort(dim=1, descending=True, stable=True)[:, : min(num_neighbours, length - 1)]
        counts = patch[nearest] & patch[centre].unsqueeze(1)
        own.scatter_(1, nearest, torch.where(counts, score[nearest].float(), 0.0))
    return weights.scatter_(2, centres.unsqueeze(2), 1.0)


def adaptive_tokens(
    values: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor, plus: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge an image's tokens as the released code does, into as many as its attention has outliers.

    With attention above Q3 + 1.5 IQR in m of N tokens, the centres are the m most attended; `plus` adds every s-th
    token but the last, s = int(int(1 / (m / N)) / 3), at least 1.

    Args:
        values: What is merged, (N, C).
        keys: (N, D).
        attention: (N,). Released: of the last layer, its heads taken for one.
        plus: Whether it is PruMerge+.

    Returns:
        Tokens, (K + 1, C): one for each centre, and the sum of what is no centre, weighted by attention; and the
        centres, (K,), those by attention first, falling.
    """
    low, high = torch.quantile(attention.float(), attention.new_tensor([0.25, 0.75], dtype=torch.float32))
    count = int((attention > high + 1.5 * (high - low)).sum())
    centres = attention.argsort(descending=True, stable=True)[:count]
    if plus and count:
        spread = torch.arange(0, len(values) - 1, max(1, int(1 / (count / len(values))) // 3), device=centres.device)
        centres = torch.cat([centres, spread[~torch.isin(spread, centres)]])
    rest = attention.float().index_fill(0, centres, 0.0).unsqueeze(0)
    weights = neighbour_weights(keys.unsqueeze(0), attention.unsqueeze(0), centres.unsqueeze(0))[0]
    return torch.cat([weights, rest]) @ values.float(), centres


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(TowerMerger):
    """Keep attended and evenly spread visual tokens, each with a share of the tokens most like it.

    Attributes:
        attended: Share of the kept tokens that are picked by attention, in 0..1, rounded half to even, at least one
            token; the others are picked at even distances.
        num_neighbours: How many tokens are merged into each, at least 0.
    """

    attended: float = 0.25
    num_neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("attended", self.attended)
        check_integer("num_neighbours", self.num_neighbours, least=0)

    def select(self, visual: VisualTokens, num_keep: int) -> Selection:
        attention, keys = self.given(visual, "attention", "keys")
        centres = select_centres(attention, num_keep, max(1, round(self.attended * num_keep)))
        # Attention that is received is 1 on average: sums would be of 32 whole tokens.
        total = attention.clamp_min(0).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return mix_tokens(visual, centres, neighbour_weights(keys, attention / total, centres, self.num_neighbours))
