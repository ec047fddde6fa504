"""FasterVLM: keep the visual tokens that the vision tower itself attends to most.

Paper: https://arxiv.org/abs/2412.01818. Training-free. Differs from the paper: where the tower has no [CLS] token,
tokens are ranked by the attention they receive from all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from vltok.checks import check_choice
from vltok.method import register
from vltok.methods.pruning.ranking import select_top
from vltok.methods.pruning.tower import TowerSelector
from vltok.visual import AttentionRequest, VisualTokens


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(TowerSelector):
    """Keep the visual tokens with the most attention in the layer whose output LLaVA uses, the last but one.

    Attributes:
        score: "cls" ranks by the attention of the [CLS] query, "received" by the mean attention of all queries; "auto"
            takes "cls" where the vision tower has a [CLS] token.
    """

    score: Literal["auto", "cls", "received"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, ("auto", "cls", "received"))

    def attention_request(self, has_cls: bool) -> AttentionRequest:
        request = super().attention_request(has_cls)
        return request if self.score == "auto" else replace(request, kind=self.score)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        (attention,) = self.given(visual, "attention")
        return select_top(attention, num_keep)
