"""The building blocks of vltok's methods as modules, for models of your own.

selector = vltok.nn.DiversitySelector(keep_ratio=0.1)
kept, indices = selector(tokens)
"""

from __future__ import annotations

import torch
from torch import nn

from vltok.methods.adl.diversification import AttentionDiversificationLoss, attention_diversification_loss
from vltok.methods.condensing.token_packer.projector import TokenPackerProjector
from vltok.methods.pruning.todre import Pivot, Strategy, ToDRE, choose_pivot, select_diverse
from vltok.methods.soft.attention import SoftmaxFreeAttention
from vltok.methods.tap.pooling import TokenAwareAveragePooling
from vltok.tokens import gather_tokens, keep_count

__all__ = [
    "AttentionDiversificationLoss",
    "DiversitySelector",
    "SoftmaxFreeAttention",
    "TokenAwareAveragePooling",
    "TokenPackerProjector",
    "attention_diversification_loss",
]


class DiversitySelector(nn.Module):
    """Keep the tokens of each sequence that differ most from each other (ToDRE, stage 1).

    Has no weights. Gradients flow through the kept tokens. Paper: https://arxiv.org/abs/2505.18757.

    Args:
        keep_ratio: Share of the tokens to keep, in (0, 1]. Exactly one of keep_ratio and num_keep.
        num_keep: Number of tokens to keep, at least 1; all where there are fewer.
        strategy: "max_sum" or "k_center", see `vltok.methods.pruning.todre.select_diverse`.
        pivot: Where to start if `forward` isn't told: "cls" (needs attention), "center", "farthest", or "auto", which
            is "cls" if attention is given, else "center".

    Raises:
        ValueError, TypeError: If a setting is out of range.
    """

    def __init__(
        self,
        keep_ratio: float | None = None,
        num_keep: int | None = None,
        strategy: Strategy = "max_sum",
        pivot: Pivot = "auto",
    ) -> None:
        super().__init__()
        if pivot == "random":
            raise ValueError('pivot="random" needs to know the image; draw the first tokens and pass them to forward')
        settings = ToDRE(keep_ratio, num_keep, strategy=strategy, pivot=pivot, relevance=False)
        self.keep_ratio, self.num_keep = settings.keep_ratio, settings.num_keep
        self.strategy, self.pivot = settings.strategy, settings.pivot

    def forward(
        self, tokens: torch.Tensor, first: torch.Tensor | None = None, attention: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select tokens.

        Args:
            tokens: (B, N, D), any float dtype.
            first: The first token of each sequence, (B,), int64; None applies the rule `pivot`.
            attention: A score per token, (B, N), such as [CLS] attention; the highest is where "cls" starts.

        Returns:
            The kept tokens, (B, K, D), in their order, and their positions, (B, K), ascending, int64.

        Raises:
            ValueError: If `first` doesn't fit the tokens, or a token is NaN or infinite.
        """
        num_keep = keep_count(tokens.shape[1], self.keep_ratio, self.num_keep)
        if first is None:
            first = choose_pivot(tokens, self.pivot, attention=attention)
        indices = select_diverse(tokens, num_keep, first, self.strategy)
        return gather_tokens(tokens, indices), indices

    def extra_repr(self) -> str:
        budget = f"num_keep={self.num_keep}" if self.keep_ratio is None else f"keep_ratio={self.keep_ratio}"
        return f"{budget}, strategy={self.strategy!r}, pivot={self.pivot!r}"
