"""ADL: while a ViT trains, a loss that keeps its tokens from all attending to the same few.

Paper: https://arxiv.org/abs/2303.11126. Differs from the released code: the loss of a single picture counts too (there
it is 0), and probabilities are computed from queries and keys, so that the model's own attention stays fused.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vltok.checks import Blocks, check_blocks, chosen_blocks, is_number
from vltok.edits import Edits
from vltok.errors import UnsupportedInputError
from vltok.method import Method, Run, register
from vltok.methods.adl.diversification import attention_diversification_loss, score_diversification_loss
from vltok.recompute import is_recomputing
from vltok.report import Diversification
from vltok.views import VisionHost


@register("adl")
@dataclass(frozen=True)
class ADL(Method):
    """Attention diversification loss: add `handle.loss()` to the loss that a model is trained with.

    It changes nothing that the model computes, and does nothing in eval mode.

    Attributes:
        weight: What `handle.loss()` multiplies the loss by.
        threshold: Attention counts where it exceeds this over the number of tokens, above 0.
        blocks: Which blocks, as (start, stop) of a Python range: (0, 6) the first six, (-2, None) the last two. All by
            default.
    """

    training_free: ClassVar[bool] = False

    weight: float = 1.0
    threshold: float = 2.0
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "threshold"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (name == "threshold" and value == 0):
                least = "above" if name == "threshold" else "at least"
                raise ValueError(f"{name} must be finite and {least} 0, got {value}")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def settled(self, view: VisionHost) -> ADL:
        return replace(self, blocks=chosen_blocks(self.blocks, view.vision.depth))

    def attach(self, view: VisionHost, edits: Edits, run: Run) -> None:
        blocks = self.settled(view).blocks
        run.fact("diversification", Diversification(blocks))
        view.vision.watch_scores(edits, range(*blocks), _Losses(run, blocks, self.weight, self.threshold))


class _Losses:
    """Collects the losses of the blocks while pictures pass through the tower."""

    def __init__(self, run: Run, blocks: tuple[int, int], weight: float, threshold: float) -> None:
        self.run = run
        self.blocks = blocks
        self.weight = weight
        self.threshold = threshold
        self._losses: dict[int, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Losses:
        twin = _Losses(copy.deepcopy(self.run, memo), self.blocks, self.weight, self.threshold)
        memo[id(self)] = twin
        return twin

    def start(self) -> None:
        self._losses = {}
        self.run.losses.pop("adl", None)

    def see(self, block: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        self._count(block, score_diversification_loss(query, key, scale, self.threshold))

    def see_map(self, block: int, attention: torch.Tensor) -> None:
        self._count(block, attention_diversification_loss(attention, self.threshold))

    def _count(self, block: int, loss: torch.Tensor) -> None:
        # A backward pass that recomputes this block needs the loss to be computed again, and not to be counted again.
        if is_recomputing():
            if loss.requires_grad and block in self._losses and not self._losses[block].requires_grad:
                raise UnsupportedInputError(
                    "reentrant gradient checkpointing makes attention without a graph first, so the attention "
                    "diversification loss would train nothing; use the other kind, use_reentrant=False"
                )
            return
        self._losses[block] = loss
        mean = sum(self._losses.values()) / (self.blocks[1] - self.blocks[0])
        self.run.loss("adl", self.weight * mean)
        losses = tuple(each.detach() for _, each in sorted(self._losses.items()))
        self.run.report("diversification", Diversification(self.blocks, losses))
