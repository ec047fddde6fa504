"""PyramidDrop: keep fewer and fewer visual tokens, stage by stage, by the attention of the prompt's last token.

Paper: https://arxiv.org/abs/2410.17247. Training-free. Differs from the released code: tokens are ranked by the
attention of the last layer of a stage, where that asks the first layer of the next; they keep their positions, where
that counts anew; images have their own budgets; any padding will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.pruning.ranking import keep_top
from vltok.methods.pruning.rule import RuleInStages
from vltok.visual import DecoderState


@register("pyramid_drop")
@dataclass(frozen=True)
class PyramidDrop(RuleInStages):
    """Keep half, a quarter and an eighth of the visual tokens after each quarter of the decoder.

    Averaged over the layers, 0.47 of all visual tokens are there.
    """

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)

    def keep(self, state: DecoderState) -> torch.Tensor:
        scores = state.attention(state.last.unsqueeze(1)).squeeze(1)
        return keep_top(scores, state.images, self.budgets(state))
