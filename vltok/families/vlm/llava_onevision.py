"""LLaVA-OneVision: AnyRes crops as in LLaVA-NeXT, shrunk where they are many; videos of pooled frames."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.engine.features import Encoding
from vltok.engine.projector import projector_site
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite


class LlavaOnevision(VlmFamily):
    """How LLaVA-OneVision is put together. It interpolates between the tokens of many crops, so they show no patch."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_classes = ("LlavaOnevisionModel",)
    reads_attention = False
    patch_counters = ("pack_image_features", "apply_pooling")
    videos = "yes"

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> tuple[int, int, int] | None:
        return super().grid(model, encoding, offset, length) if encoding.kind == "video" else None

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model)

    def processor_fields(self, model: nn.Module, scale_factor: int) -> dict[str, tuple[Any, Any]]:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return {"num_image_tokens": (side**2, (side // scale_factor) ** 2)}
