"""Families that show all that vltok needs, but for a fact or two. Each is a line in the table of this package."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from vltok.engine.features import PIXELS, Encoding, pixel_keys
from vltok.engine.parts import live
from vltok.engine.patches import Order
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.base import VlmFamily
from vltok.tokens import Grid3


class Generic(VlmFamily):
    """A family that is read off its models.

    Args:
        name: The model type.
        title: What people call it.
        model_classes: Names of the classes, without the head.
        unit: What an image is, see `VlmFamily`.
        gap: How many words may stand between tiles of one image.
        patches: How the tower has its patches, see `VlmFamily`.
        marks: The ids that stand for visual tokens, where these are not to be read from the config.
        facts: What people are told, see `VlmFamily`.

    Raises:
        TypeError: If there is no such fact.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model_classes: tuple[str, ...],
        unit: str = "entry",
        gap: int = 0,
        patches: Order | None = None,
        marks: dict[str, int] | None = None,
        **facts: Any,
    ) -> None:
        if unknown := [fact for fact in facts if not hasattr(VlmFamily, fact)]:
            raise TypeError(f"VlmFamily has no {', '.join(unknown)}, which {title} is described by")
        vars(self).update(facts)
        self.name, self.title, self.model_classes = name, title, model_classes
        self.unit, self.gap, self.patches, self._marks = unit, gap, patches, marks or {}

    @staticmethod
    def fits(part: nn.Module) -> bool:
        """Whether part of a model encodes images and has a decoder, as most models of transformers do."""
        decoder = decoder_of(part)
        has_configs = hasattr(part, "config") and hasattr(decoder, "config")
        return has_configs and hasattr(part, "get_image_features") and hasattr(decoder, "layers")

    def check(self, model: nn.Module) -> None:
        name = type(model).__name__
        if not self.fits(model):
            raise UnsupportedModelError(
                f"{name} doesn't have both get_image_features() and a decoder with `layers`, called language_model or "
                "text_model, and a config of each; if a part of it has, register the class of this part; if they go by "
                "other names, say so in a subclass of vltok.families.vlm.base.VlmFamily and register that: "
                "vltok.register_family()"
            )
        for part in (model, decoder_of(model)):
            kinds = {each.kind for each in inspect.signature(type(part).forward).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                raise UnsupportedModelError(
                    f"{type(part).__name__}.forward() takes no **kwargs, by which vltok tells a decoder what was "
                    "pruned; let the model and its decoder take them and hand them on, to the layers"
                )
        for method in (type(model).forward, type(model).get_image_features):
            parameters = inspect.signature(method).parameters
            hands_on = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values())
            if not hands_on and not any(PIXELS in each for each in parameters):
                raise UnsupportedModelError(
                    f"{name}.{method.__name__}() has no parameter {PIXELS}, by which vltok knows that images come; let "
                    "both forward() and get_image_features() call them so"
                )
        if not self.marks(model):
            raise UnsupportedModelError(
                f"the config of {name} names no image_token_id; say which id stands for visual tokens: "
                'vltok.apply(model, method, family="generic", image_token_id=...)'
            )

    def marks(self, model: nn.Module) -> dict[str, int]:
        return super().marks(model) | self._marks

    def tower(self, model: nn.Module) -> nn.Module:
        names = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
        found = next((getattr(model, name) for name in names if hasattr(model, name)), None)
        if found is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no vision tower that vltok can find: nothing of it is called "
                f"{', '.join(names[:-1])} or {names[-1]}"
            )
        return live(found)


def decoder_of(part: nn.Module) -> nn.Module | None:
    """What part of a model calls its decoder, or None."""
    return getattr(part, "language_model", getattr(part, "text_model", None))


class VideoLlava(Generic):
    """Video-LLaVA: a tower for images and another one for videos."""

    def towers(self, model: nn.Module) -> list[nn.Module]:
        return [live(model.image_tower), live(model.video_tower)]


class PerceptionLm(Generic):
    """PerceptionLM: its tower is timm's."""

    def patch_size(self, model: nn.Module) -> int:
        return self.tower(model).timm_model.patch_embed.patch_size[0]


class HunYuanVl(Generic):
    """HunYuan-VL: tokens before and behind a picture, and one behind each row, stand for no patch."""

    def of_tokens(self, model: nn.Module, encoding: Encoding, name: str, fill: float) -> torch.Tensor:
        merge = self.merge(model)
        sides = [(height // merge, width // merge) for _, height, width in encoding.grids]
        counts = [rows * columns for rows, columns in sides]
        pictures = self.of_projected(model, encoding, name, sum(counts), fill).split(counts)
        nothing = pictures[0].new_full((1, *pictures[0].shape[1:]), fill)
        whole = []
        for own, (_, columns) in zip(pictures, sides, strict=True):
            whole += [nothing, *(part for row in own.split(columns) for part in (row, nothing)), nothing]
        return torch.cat(whole)


class Idefics3(Generic):
    """Idefics3 and its kin: a token before each tile, and a last one behind the image."""

    def joins(self, words: list[int], end: int, begin: int) -> bool:
        around = words[begin - 2]  # before a tile stand this one and the tile's number
        return words[end:begin].count(around) == 1


class GraniteDocling(Generic):
    """Granite Docling: before each tile stands its place, and the first one of an image has always the same."""

    def joins(self, words: list[int], end: int, begin: int) -> bool:
        first = words.index(words[begin])
        return words[begin - 1] != words[first - 1]


class MiniCpm(Generic):
    """MiniCPM-V: the patches of all pictures, slices and frames stand side by side, and are merged on the way."""

    def patch_grids(self, model: nn.Module, encoding: Encoding, values: torch.Tensor) -> tuple[list[Grid3], bool]:
        sizes = encoding.arguments["target_sizes"]
        merge = math.isqrt(int(sizes.prod(-1).sum()) // (values.shape[0] * values.shape[1]))
        return [(1, height // merge, width // merge) for height, width in sizes.tolist()], False

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        widths = (encoding.arguments["target_sizes"].prod(-1) * pixels.shape[-2]).tolist()
        return torch.cat([pixel_keys(own) for own in pixels.split(widths, dim=-1)])
