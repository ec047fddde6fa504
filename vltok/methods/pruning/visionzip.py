"""VisionZip: keep the tokens that the vision tower attends to most, and merge the others into a few.

Paper: https://arxiv.org/abs/2412.04467. Training-free. Differs from the released code: the [CLS] token is no visual
token here and takes none of the budget (there, 64 tokens are [CLS], 53 dominant and 10 contextual ones); a contextual
token stands where its target stood, not behind all others; a key of norm zero is similar to none. The released sums
over the heads rank like the means here. Given [CLS] as a token of more attention than any other, `dominant_and_targets`
picks the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vltok.checks import check_share
from vltok.method import register
from vltok.methods.pruning.greedy import check_usable, cosine_matrix
from vltok.methods.pruning.tower import TowerMerger, mix_tokens, pick_patches
from vltok.visual import Selection, VisualTokens


def dominant_and_targets(attention: torch.Tensor, num_keep: int, num_targets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the tokens with the most attention, and of the rest those at even distances, into which others are merged.

    With R tokens in the rest, the targets are number 0, s, 2s, ... of these, s = R // num_targets.

    Args:
        attention: (B, N), -inf where a token stands for no patch.
        num_keep: How many to keep in all, in 1..N.
        num_targets: How many of these are targets, in 0..num_keep.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; and which of these are targets, (B, num_keep), bool.

    Raises:
        ValueError: If a count is out of range, or attention is NaN or +inf.
    """
    if not 0 <= num_targets <= num_keep:
        raise ValueError(f"num_targets must be in 0..{num_keep} (the kept tokens), got {num_targets}")

    def dominant_first(scores: torch.Tensor) -> torch.Tensor:
        return scores.argsort(dim=-1, descending=True, stable=True)

    def pick(image: int, patches: torch.Tensor) -> torch.Tensor:
        order = dominant_first(attention[image, patches])
        dominant, rest = order[: num_keep - num_targets], order[num_keep - num_targets :].sort().values
        return torch.cat([dominant, rest[:: len(rest) // max(1, num_targets)][:num_targets]])

    kept = pick_patches(attention, num_keep, pick)
    is_target = torch.zeros_like(kept, dtype=torch.bool)
    last = dominant_first(attention.gather(1, kept))[:, num_keep - num_targets :]
    return kept, is_target.scatter_(1, last, True)


@torch.no_grad()
def contextual_weights(
    keys: torch.Tensor, attention: torch.Tensor, kept: torch.Tensor, is_target: torch.Tensor, average: bool = False
) -> torch.Tensor:
    """Say what each kept token is made of, where every dropped one goes to the target whose key is most like its own.

    Args:
        keys: (B, N, C), any float dtype; they are compared by their cosine in float32.
        attention: (B, N), -inf where a token stands for no patch and is merged into nothing.
        kept: Kept positions, (B, K).
        is_target: Which of these are targets, (B, K), bool.
        average: False adds the mean of what went to a target to the target, as released: it about doubles in length.
            True takes the mean over the target and what went there.

    Returns:
        Weights, (B, K, N), float32. Equal cosines go to the target of the lowest index.

    Raises:
        ValueError: If a key is NaN or infinite.
    """
    check_usable(keys)
    weights = torch.zeros(*kept.shape, keys.shape[1], device=keys.device)
    weights.scatter_(2, kept.unsqueeze(2), 1.0)
    for own, key, score, places, target in zip(weights, keys, attention, kept, is_target, strict=True):
        dropped = score > -math.inf
        dropped[places] = False
        slots, dropped = target.nonzero().squeeze(1), dropped.nonzero().squeeze(1)
        if len(slots) and len(dropped):
            cosine = cosine_matrix(key.unsqueeze(0))[0][dropped][:, places[slots]]
            own[slots[cosine.argmax(1)], dropped] = 1.0
    total = weights.sum(2, keepdim=True)
    if average:
        return weights / total
    merged = weights / (total - 1).clamp_min(1)
    return merged.scatter_(2, kept.unsqueeze(2), 1.0)


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(TowerMerger):
    """Keep the visual tokens with the most attention, and merge all others into a few contextual tokens.

    Attributes:
        contextual: Share of the kept tokens that are contextual, in 0..1, rounded half to even; at least one token is
            dominant. 10/64 is the paper's split of 64 tokens; budgets below 4 then have none.
        average: Whether a contextual token is a mean of tokens, see `contextual_weights`; as released it is none.
    """

    contextual: float = 10 / 64
    average: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("contextual", self.contextual)
        if not isinstance(self.average, bool):
            raise TypeError(f"average must be True or False, got {self.average!r}")

    def select(self, visual: VisualTokens, num_keep: int) -> Selection:
        attention, keys = self.given(visual, "attention", "keys")
        if visual.num_heads is not None:
            keys = keys.detach().float().unflatten(2, (visual.num_heads, -1)).mean(2)  # the paper's metric
        targets = min(round(self.contextual * num_keep), num_keep - 1)
        kept, is_target = dominant_and_targets(attention, num_keep, targets)
        return mix_tokens(visual, kept, contextual_weights(keys, attention, kept, is_target, self.average))
