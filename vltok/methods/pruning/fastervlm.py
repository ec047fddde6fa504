"""FasterVLM: keep the visual tokens that the vision tower itself attends to most.

Paper: https://arxiv.org/abs/2412.01818. Training-free. Differs from the paper: where the tower has no [CLS] token,
tokens are ranked by the attention they receive from all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vltok.method import register
from vltok.methods.pruning.selector import Selector
from vltok.visual import AttentionRequest, VisualTokens


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


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Selector):
    """Keep the visual tokens with the most attention in the layer whose output LLaVA uses, the last but one.

    Attributes:
        score: "cls" ranks by the attention of the [CLS] query, "received" by the mean attention of all queries; "auto"
            takes "cls" where the vision tower has a [CLS] token.
    """

    score: Literal["auto", "cls", "received"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("auto", "cls", "received"):
            raise ValueError(f'score must be "auto", "cls" or "received", got {self.score!r}')

    def attention_request(self, has_cls: bool) -> AttentionRequest:
        kind = self.score if self.score != "auto" else ("cls" if has_cls else "received")
        return AttentionRequest(kind, layer=-2)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        if visual.attention is None:
            raise ValueError("FasterVLM ranks visual tokens by the vision tower's attention; give `attention`, (B, N)")
        return select_top(visual.attention, num_keep)
