"""LLaVA-OneVision: AnyRes crops as in LLaVA-NeXT, shrunk where they are many; videos of pooled frames."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.errors import UnsupportedModelError
from vltok.families.base import VlmFamily
from vltok.families.llava_next import CoarserPatches
from vltok.families.projector import projector_site
from vltok.method import Run
from vltok.views import ProjectorSite


class LlavaOnevision(VlmFamily):
    """How LLaVA-OneVision is put together. Its projector can be replaced; its visual tokens can't be pruned."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_class = "LlavaOnevisionModel"

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

    def swap_projector(
        self,
        edits: Edits,
        run: Run,
        model: nn.Module,
        processor: Any,
        projector: nn.Module,
        levels: tuple[int, ...],
        scale_factor: int,
    ) -> dict[str, dict[str, Any]]:
        before = super().swap_projector(edits, run, model, processor, projector, levels, scale_factor)
        for name in ("pack_image_features", "apply_pooling"):
            edits.set_attribute(model, name, CoarserPatches(model, name, scale_factor))
        return before
