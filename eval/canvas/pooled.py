"""Projectors that condense the visual tokens of the canvas model: average pooling, beside vltok's TokenPacker."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, ProcessorMixin

import vltok
from eval.canvas.data import GRID


class PooledProjector(nn.Module):
    """Mean of each s x s region of patches, then the MLP of a LLaVA projector; s = 1 is that projector.

    Args:
        old: A projector of two linear layers with an activation between; its layers are copied.
        scale: Side s of a region, a divisor of the grid's.
    """

    def __init__(self, old: nn.Module, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.linear_1, self.act, self.linear_2 = (deepcopy(part) for part in (old.linear_1, old.act, old.linear_2))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Condense patches, (B, N, C), row by row in a square grid: (B, N / s^2, D)."""
        grid = image_features.mT.unflatten(-1, (GRID, GRID))  # (B, C, GRID, GRID)
        regions = F.avg_pool2d(grid, self.scale).flatten(2).mT
        return self.linear_2(self.act(self.linear_1(regions)))


@dataclass(frozen=True)
class Variant:
    """A projector to train: "tokenpacker", or "average" pooling; `scale` is the side of a region of patches."""

    kind: str
    scale: int

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.kind}-s{self.scale}"

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return (GRID // self.scale) ** 2

    def method(self) -> vltok.TokenPacker:
        """The vltok method of a "tokenpacker"."""
        return vltok.TokenPacker(scale_factor=self.scale, init="pool")

    def put_on(self, model: LlavaForConditionalGeneration, processor: ProcessorMixin) -> nn.Module:
        """Give the model this projector, untrained, and the processor its number of placeholders.

        Random parts come from torch's global generator. Returns the projector.
        """
        if self.kind == "tokenpacker":
            vltok.apply(model, self.method(), processor=processor)
        else:
            model.model.multi_modal_projector = PooledProjector(model.model.multi_modal_projector, self.scale)
            processor.patch_size *= self.scale
        return model.model.multi_modal_projector


def levels(model: LlavaForConditionalGeneration) -> list[int]:
    """The hidden states of the tower that the model's projector reads, concatenated on channels."""
    given = model.config.vision_feature_layer
    return [given] if isinstance(given, int) else list(given)
