"""Families that show all that vltok needs, but for a fact or two. Each is a line in the table of this package."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import pad

from vltok.engine.features import Encoding, pixel_keys
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
    ) -> None:
        self.name, self.title, self.model_classes = name, title, model_classes
        self.unit, self.gap, self.patches, self._marks = unit, gap, patches, marks or {}

    def check(self, model: nn.Module) -> None:
        if not self.marks(model):
            raise UnsupportedModelError(
                f"the config of {type(model).__name__} names no image_token_id; say which id stands for visual tokens: "
                'vltok.apply(model, method, family="generic", image_token_id=...)'
            )

    def marks(self, model: nn.Module) -> dict[str, int]:
        return super().marks(model) | self._marks

    def tower(self, model: nn.Module) -> nn.Module:
        names = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
        return live(next(getattr(model, name) for name in names if hasattr(model, name)))


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

    def token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor:
        merge = self.merge(model)
        sides = [(height // merge, width // merge) for _, height, width in encoding.grids]
        counts = [rows * columns for rows, columns in sides]
        scores = self.projected_attention(model, encoding, sum(counts)).split(counts)
        whole = [pad(own.unflatten(0, side), (0, 1), value=-torch.inf) for own, side in zip(scores, sides, strict=True)]
        return torch.cat([pad(own.flatten(), (1, 1), value=-torch.inf) for own in whole])


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

    def patch_grids(self, model: nn.Module, encoding: Encoding) -> tuple[list[Grid3], bool]:
        sizes = encoding.arguments["target_sizes"]
        merge = math.isqrt(int(sizes.prod(-1).sum()) // encoding.tower_attention.numel())
        return [(1, height // merge, width // merge) for height, width in sizes.tolist()], False

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        widths = (encoding.arguments["target_sizes"].prod(-1) * pixels.shape[-2]).tolist()
        return torch.cat([pixel_keys(own) for own in pixels.split(widths, dim=-1)])
