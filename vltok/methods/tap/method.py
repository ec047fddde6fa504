"""TAP: let each token of a ViT draw on its neighbourhood before attention, which makes it robust to corrupted pictures.

Paper: https://arxiv.org/abs/2303.11126. Needs training. Differs from it: it goes into a ViT that exists, and by default
starts near the identity, so that the model computes nearly as before until it is fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vltok.checks import Blocks, check_blocks, check_choice, chosen_blocks
from vltok.edits import Edits
from vltok.method import Method, Run, register
from vltok.methods.tap.pooling import TokenAwareAveragePooling
from vltok.report import Pooling
from vltok.views import VisionHost

Init = Literal["identity", "published"]
CHILD = "dilation_predictor"  # in a block, as released


@register("tap")
@dataclass(frozen=True)
class TAP(Method):
    """Pool tokens before the attention of a vision tower, each at a scale of its own. Not training-free: fine-tune it.

    While it trains, images of one size are normalised by their own statistics, where several sizes come together.

    Attributes:
        num_scales: Scales to choose from: the token itself, and means over 3 x 3 patches that are 1, 2, ... patches
            apart.
        temperature: Of the softmax over scales, above 0.
        blocks: Which blocks, as (start, stop) of a Python range: (0, 6) the first six, (-2, None) the last two. All by
            default.
        init: What new weights start as: "identity" lets each token take about 0.1 % of itself from elsewhere, so that a
            trained model computes nearly what it did; "published" is the start of the paper, for training from scratch.
    """

    training_free: ClassVar[bool] = False

    num_scales: int = 4
    temperature: float = 1.0
    blocks: Blocks | None = None
    init: Init = "identity"

    def __post_init__(self) -> None:
        check_choice("init", self.init, Init)
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        with torch.device("meta"):
            TokenAwareAveragePooling(1, self.num_scales, temperature=self.temperature)  # checks the others

    def settled(self, view: VisionHost) -> TAP:
        return replace(self, blocks=chosen_blocks(self.blocks, view.vision.depth))

    def attach(self, view: VisionHost, edits: Edits, run: Run) -> None:
        vision, blocks = view.vision, self.settled(view).blocks
        for block in range(*blocks):
            pooling = TokenAwareAveragePooling(
                vision.dim,
                self.num_scales,
                vision.num_prefix_tokens,
                self.temperature,
                identity_init=self.init == "identity",
            )
            vision.pool_before_attention(edits, block, CHILD, pooling)
        run.fact("pooling", Pooling(blocks, self.num_scales))
