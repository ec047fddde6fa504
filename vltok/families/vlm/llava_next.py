"""LLaVA-NeXT: a thumbnail and AnyRes crops of each picture, laid out as one map with a newline after every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vltok.edits import Edits
from vltok.engine.features import Encoding, pixel_keys
from vltok.engine.pictures import Picture
from vltok.errors import UnsupportedInputError
from vltok.families.vlm.base import VlmFamily
from vltok.families.vlm.llava import Llava
from vltok.tokens import Grid3


class LlavaNext(Llava):
    """How LLaVA-NeXT is put together."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    model_classes = ("LlavaNextModel",)
    patch_counters = ("pack_image_features",)
    windows = False
    merging_changes = VlmFamily.merging_changes  # its maps of crops need grids

    def of_tokens(self, model: nn.Module, encoding: Encoding, name: str, fill: float) -> torch.Tensor:
        numbers, length = self._numbers(model, encoding)
        values = self.of_projected(model, encoding, name, sum(self._crops(model, encoding)) * length, fill)
        flat = torch.cat([values, values.new_full((1, *values.shape[1:]), fill)])  # number -1: a newline
        return flat[torch.cat(numbers).to(flat.device)]

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        numbers, length = self._numbers(model, encoding)
        first = sum(self._crops(model, encoding)[: picture.entries.start])
        own = numbers[picture.entries.start]
        return (own >= first * length) & (own < (first + 1) * length)

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> None:
        """None: rows of several crops follow each other, each with a newline."""

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dim() == 5:  # padded to the same number of crops
            return pixel_keys(pixels)
        return torch.cat([pixel_keys(own.unsqueeze(0)) for own in pixels.split(self._crops(model, encoding))])

    def _crops(self, model: nn.Module, encoding: Encoding) -> list[int]:
        """Rows of the tower that each picture has."""
        if "crops" not in encoding.notes:
            config = model.config
            encoding.notes["crops"] = [
                image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
                for size in encoding.arguments["image_sizes"]
            ]
        return encoding.notes["crops"]

    def _numbers(self, model: nn.Module, encoding: Encoding) -> tuple[list[torch.Tensor], int]:
        """For each picture, which projected row each of its tokens is, -1 for newlines; and how many rows a crop has.

        The model itself says where each row goes: it packs their numbers in the place of the features.
        """
        if "numbers" not in encoding.notes:
            crops = self._crops(model, encoding)
            vision = model.config.vision_config
            coarser = getattr(vars(model).get("pack_image_features"), "scale", 1)  # where a projector condenses
            length = (vision.image_size // vision.patch_size // coarser) ** 2
            numbers = torch.arange(sum(crops) * length, dtype=torch.float64).view(-1, length, 1).split(crops)
            packed, _ = model.pack_image_features(
                numbers,
                encoding.arguments["image_sizes"],
                encoding.arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy,
                image_newline=torch.full((1,), -1.0),
            )
            encoding.notes["numbers"] = [each.flatten().long() for each in packed], length
        return encoding.notes["numbers"]


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos whose frames are pooled."""

    name = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    model_classes = ("LlavaNextVideoModel",)
    videos = "yes"

    def follow_projector(self, edits: Edits, model: nn.Module, levels: tuple[int, ...]) -> None:
        """Refuse videos."""
        edits.before(model.vision_resampler, _refuse_videos)

    def of_tokens(self, model: nn.Module, encoding: Encoding, name: str, fill: float) -> torch.Tensor:
        if encoding.kind == "video":
            return self.of_projected(model, encoding, name, sum(encoding.lengths), fill)
        return super().of_tokens(model, encoding, name, fill)

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        return None if encoding.kind == "video" else super().overview(model, encoding, picture)

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> Grid3 | None:
        return VlmFamily.grid(self, model, encoding, offset, length) if encoding.kind == "video" else None

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        return pixel_keys(pixels) if encoding.kind == "video" else super().pixel_keys(model, encoding, pixels)


def _refuse_videos(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise UnsupportedInputError(
        "LLaVA-NeXT-Video pools the frames of videos before its projector, and the one in its place reads whole grids "
        "of patches; give images, or take the method off for videos"
    )
