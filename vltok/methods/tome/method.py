"""ToMe: merge the tokens of a ViT that are most alike, some in every block, so that later blocks have fewer.

Paper: https://arxiv.org/abs/2210.09461. Training-free; gradients flow. Differs from the released code: it is put on by
hooks, what is left stays in the order of the patches, and in a LLaVA model placeholders follow. Pooling over patches
counts each token that is left once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vltok.checks import check_budget, check_integer
from vltok.edits import Edits
from vltok.method import Method, Run, register
from vltok.methods.tome.merging import match_tokens, merge_schedule
from vltok.report import Merging
from vltok.tokens import keep_count
from vltok.views import MergingView


@register("tome")
@dataclass(frozen=True)
class ToMe(Method):
    """Merge similar tokens between attention and MLP in a vision tower; in LLaVA, images have fewer visual tokens.

    A merged token is the mean of all that went into it. [CLS] and other prefix tokens are never merged. In a
    vision-language model only the blocks count whose output the projector reads, and the processor writes fewer
    placeholders while the method is on. Of r and keep_ratio one is given.

    Attributes:
        r: Patches to merge away in every block, or a tuple with a number for each block of the tower; a block merges at
            most half of the patches that enter it, as released.
        keep_ratio: Share of the patches that the tower is to hand on, in (0, 1], of an image of the size that it was
            made for. It is reached exactly, by merging about as many in every block.
        proportional: Whether attention counts a token as often as it stands for; False for towers that were trained
            without labels, such as MAE.
    """

    r: int | tuple[int, ...] | None = None
    keep_ratio: float | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        check_budget(self.keep_ratio, None)
        if (self.r is None) == (self.keep_ratio is None):
            raise ValueError(f"give one of r and keep_ratio, got r={self.r} and keep_ratio={self.keep_ratio}")
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        for count in self.r if isinstance(self.r, tuple) else (0 if self.r is None else self.r,):
            check_integer("r", count, 0)
        if not isinstance(self.proportional, bool):
            raise TypeError(f"proportional must be True or False, got {self.proportional!r}")

    def settled(self, view: MergingView) -> ToMe:
        read, vision = view.merging_blocks(), view.vision
        merges: Sequence[int]
        if isinstance(self.r, tuple):
            if len(self.r) != vision.depth:
                raise ValueError(f"r has {len(self.r)} numbers, and this vision tower {vision.depth} blocks")
            merges = self.r[:read]
        elif self.r is not None:
            merges = (self.r,) * read
        else:
            patches = math.prod(vision.grid)
            merges = merge_schedule(patches, read, keep_count(patches, self.keep_ratio))
        return replace(self, r=(*merges, *[0] * (vision.depth - read)), keep_ratio=None)

    def attach(self, view: MergingView, edits: Edits, run: Run) -> None:
        merges = self.settled(view).r
        view.merge_tokens(edits, run, merges, self)
        if any(merges):
            run.fact("merging", Merging())

    def groups(self, keys: torch.Tensor, num_merge: int, num_prefix_tokens: int) -> torch.Tensor:
        return match_tokens(keys, num_merge, num_prefix_tokens)
