"""Kin of LLaVA that show all but where their projector stands: VipLLaVA and LLaVA-NeXT-Video."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.engine.projector import ProjectorChanges, projector_site
from vltok.errors import UnsupportedInputError
from vltok.families.vlm.base import image_seq_length
from vltok.families.vlm.generic import Generic
from vltok.method import Run
from vltok.views import ProjectorSite


class VipLlava(Generic):
    """VipLLaVA: several levels of the tower, always without the first row."""

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, "default", _levels_field(model))

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


class LlavaNextVideo(Generic):
    """LLaVA-NeXT-Video: images as in LLaVA-NeXT; frames of videos are pooled before the projector."""

    patch_counters = ("pack_image_features",)

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, model.config.vision_feature_select_strategy)

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
        edits.before(model.vision_resampler, _refuse_videos)
        return before


def _refuse_videos(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise UnsupportedInputError(
        "LLaVA-NeXT-Video pools the frames of videos before its projector, and the one in its place reads whole grids "
        "of patches; give images, or take the method off for videos"
    )
