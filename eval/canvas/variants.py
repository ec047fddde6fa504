"""Projectors that condense the visual tokens of the canvas model, as vltok's methods put them on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import LlavaForConditionalGeneration, ProcessorMixin

import vltok
from eval.canvas.data import GRID

METHODS: dict[str, Callable[..., vltok.Method]] = {
    "average": vltok.AveragePool,
    "tokenpacker": partial(vltok.TokenPacker, init="pool"),
    "shuffle": vltok.PixelShuffle,
}


@dataclass(frozen=True)
class Variant:
    """A projector to train: its kind, a key of METHODS, and the side of a region of patches.

    One of several sides, such as (2, 4), is made for all of them; each batch is seen at one that is drawn.
    """

    kind: str
    scale: int | tuple[int, ...]

    @property
    def scales(self) -> tuple[int, ...]:
        """All sides."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.kind}-s{'+'.join(map(str, self.scales))}"

    def method(self) -> vltok.Method:
        """The vltok method; every kind starts as average pooling before the model's own projector."""
        return METHODS[self.kind](scale_factor=self.scale)

    def put_on(self, model: LlavaForConditionalGeneration, processor: ProcessorMixin) -> nn.Module:
        """Give the model this projector, untrained, and the processor its number of placeholders.

        Random parts come from torch's global generator. Returns the projector.
        """
        (projector,) = vltok.apply(model, self.method(), processor=processor).added_modules
        return projector


def tokens_at(scale: int) -> int:
    """Visual tokens of a picture at a side of a region of patches."""
    return (GRID // scale) ** 2


def levels(model: LlavaForConditionalGeneration) -> list[int]:
    """The hidden states of the tower that the model's projector reads, concatenated on channels."""
    given = model.config.vision_feature_layer
    return [given] if isinstance(given, int) else list(given)
