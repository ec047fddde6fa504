"""LLaVA-OneVision: AnyRes crops as in LLaVA-NeXT, shrunk where they are many; videos of pooled frames."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from vltok.engine.features import Encoding
from vltok.engine.projector import ProjectorChanges, projector_site
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite


class LlavaOnevision(VlmFamily):
    """How LLaVA-OneVision is put together."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_classes = ("LlavaOnevisionModel",)
    patches = "rows"
    patch_counters = ("pack_image_features", "apply_pooling")
    videos = "yes"
    condensers = ("AveragePool", "PixelShuffle", "TokenPacker")

    def of_tokens(self, model: nn.Module, encoding: Encoding, name: str, fill: float) -> torch.Tensor:
        """What was read in the tower, for each visual token: packed, pooled and interpolated as the tokens are."""
        values, vision = encoding.of_tower(name), model.config.vision_config
        rows, rest = len(values), values.shape[2:]
        coarser = getattr(vars(model).get("pack_image_features"), "scale", 1)  # where a projector condenses
        length = (vision.image_size // vision.patch_size // coarser) ** 2
        projected = self.of_projected(model, encoding, name, rows * length, fill).reshape(rows, length, -1)
        if encoding.kind == "video":
            pooled = model.apply_pooling(projected).reshape(len(encoding.lengths), -1, projected.shape[-1])
            newline = pooled.new_full((len(pooled), 1, pooled.shape[-1]), fill)
            return torch.cat([pooled, newline], 1).reshape(-1, *rest)
        packed, _ = model.pack_image_features(
            projected.split(self._crops(model, encoding)),
            encoding.arguments["image_sizes"],
            image_newline=projected.new_full((projected.shape[-1],), fill),
            vision_aspect_ratio=encoding.arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio,
        )
        return torch.cat(list(packed)).reshape(-1, *rest)

    def _crops(self, model: nn.Module, encoding: Encoding) -> list[int]:
        """Rows of the tower that each picture has: one alone where a prompt has several."""
        config, counts = model.config, encoding.arguments.get("batch_num_images")
        sizes = encoding.arguments["image_sizes"]
        is_cut = [True] * len(sizes) if counts is None else [count == 1 for count in counts for _ in range(count)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if cut else 1
            for size, cut in zip(sizes, is_cut, strict=True)
        ]

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> tuple[int, int, int] | None:
        return super().grid(model, encoding, offset, length) if encoding.kind == "video" else None

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, model.config.vision_feature_select_strategy)

    def projector_changes(
        self, model: nn.Module, levels: tuple[int, ...], grid: tuple[int, int], scale_factor: int
    ) -> ProjectorChanges:
        changes, patches = super().projector_changes(model, levels, grid, scale_factor), grid[0] * grid[1]
        return replace(changes, counted={"num_image_tokens": (patches, patches // scale_factor**2)})
