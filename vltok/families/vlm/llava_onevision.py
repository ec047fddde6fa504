"""LLaVA-OneVision: AnyRes crops as in LLaVA-NeXT, shrunk where they are many; videos of pooled frames."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from vltok.engine.features import Encoding
from vltok.engine.projector import ProjectorChanges, projector_site
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite


class LlavaOnevision(VlmFamily):
    """How LLaVA-OneVision is put together. It interpolates between the tokens of many crops, so they show no patch."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_classes = ("LlavaOnevisionModel",)
    reads_attention = False
    patch_counters = ("pack_image_features", "apply_pooling")

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> tuple[int, int, int] | None:
        return super().grid(model, encoding, offset, length) if encoding.kind == "video" else None

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, model.config.vision_feature_select_strategy)

    def projector_changes(
        self, model: nn.Module, levels: tuple[int, ...], grid: tuple[int, int], scale_factor: int
    ) -> ProjectorChanges:
        changes, patches = super().projector_changes(model, levels, grid, scale_factor), grid[0] * grid[1]
        return replace(changes, counted={"num_image_tokens": (patches, patches // scale_factor**2)})
