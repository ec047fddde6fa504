"""VipLLaVA: a projector that reads several levels of the tower."""

from __future__ import annotations

from torch import nn

from vltok.engine.projector import ProjectorChanges, merging_changes, projector_site
from vltok.families.vlm.base import image_seq_length
from vltok.families.vlm.generic import Generic
from vltok.views import ProjectorSite


class VipLlava(Generic):
    """How VipLLaVA is put together: its projector never gets the first row of the tower."""

    condensers = ("TokenPacker",)

    def projector(self, model: nn.Module) -> nn.Module | None:
        return model.multi_modal_projector

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, "default", _levels_field(model))

    def merging_changes(self, model: nn.Module, num_merged: int) -> ProjectorChanges:
        return merging_changes(model, "default", num_merged)

    def projector_changes(
        self, model: nn.Module, levels: tuple[int, ...], grid: tuple[int, int], scale_factor: int
    ) -> ProjectorChanges:
        config, size = model.config, model.config.vision_config.patch_size
        return ProjectorChanges(
            config={_levels_field(model): list(levels), **image_seq_length(config, grid, scale_factor)},
            counted={"patch_size": (size, size * scale_factor)},
            shared={"image_token_id": config.image_token_id, "vision_feature_select_strategy": "default"},
        )


def _levels_field(model: nn.Module) -> str:
    """The field of the config for the levels; older versions of transformers have a plural."""
    names = ("vision_feature_layer", "vision_feature_layers")
    return next(name for name in names if name in vars(model.config))
