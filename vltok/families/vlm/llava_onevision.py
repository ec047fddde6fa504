"""LLaVA-OneVision: AnyRes crops as in LLaVA-NeXT, shrunk where they are many; videos of pooled frames."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.engine.projector import projector_site
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite


class LlavaOnevision(VlmFamily):
    """How LLaVA-OneVision is put together. Its projector can be replaced; its visual tokens can't be pruned."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_classes = ("LlavaOnevisionModel",)
    patch_counters = ("pack_image_features", "apply_pooling")

    def check_pruning(self, model: nn.Module) -> None:
        raise UnsupportedModelError(
            "LLaVA-OneVision interpolates between the visual tokens of many crops, so its tokens stand for no one "
            "patch and can't be pruned; families that can: llava, llava_next, qwen2_5_vl, internvl"
        )

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model)

    def processor_fields(self, model: nn.Module, scale_factor: int) -> dict[str, tuple[Any, Any]]:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return {"num_image_tokens": (side**2, (side // scale_factor) ** 2)}
