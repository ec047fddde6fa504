"""LLaVA-1.5 and its kin: a CLIP or SigLIP tower, one row of the tower is one image."""

from __future__ import annotations

from torch import nn

from vltok.engine.projector import ProjectorChanges, merging_changes, projector_site
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite

TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(VlmFamily):
    """LLaVA-1.5."""

    name = "llava"
    title = "LLaVA-1.5"
    model_classes = ("LlavaModel",)
    patches = "rows"
    cls = "with CLIP"
    windows = True
    condensers = ("AveragePool", "PixelShuffle", "TokenPacker")
    refuses = "vision towers other than CLIP and SigLIP"

    def check(self, model: nn.Module) -> None:
        kind = model.config.vision_config.model_type
        if kind not in TOWERS:
            raise UnsupportedModelError(
                f"a {self.title} model with a {kind!r} vision tower is not supported; supported are {', '.join(TOWERS)}"
            )

    def projector(self, model: nn.Module) -> nn.Module | None:
        return model.multi_modal_projector

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, model.config.vision_feature_select_strategy)

    def merging_changes(self, model: nn.Module, num_merged: int) -> ProjectorChanges:
        return merging_changes(model, model.config.vision_feature_select_strategy, num_merged)
