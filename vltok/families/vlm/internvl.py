"""InternVL: tiles of a picture and a thumbnail behind them, four patches merged into one visual token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits, MethodWrapper
from vltok.engine.features import Encoding
from vltok.engine.pictures import Picture
from vltok.engine.projector import ProjectorChanges, hidden_states_of
from vltok.engine.tower_layout import patch_grid
from vltok.engine.weights import check_at_hand
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.base import VlmFamily
from vltok.views import ProjectorSite


class InternVL(VlmFamily):
    """How InternVL is put together."""

    name = "internvl"
    title = "InternVL"
    model_classes = ("InternVLModel",)
    unit = "run"
    patches = "rows"
    videos = "frames"
    cls = "yes"
    windows = True
    condensers = ("TokenPacker",)

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        overview = torch.zeros(picture.length, dtype=torch.bool)
        overview[-encoding.lengths[picture.entries.stop - 1] :] = True  # the thumbnail comes last
        return overview

    def projector(self, model: nn.Module) -> nn.Module | None:
        return model.multi_modal_projector

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        config, vision = model.config, model.config.vision_config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} leaves the [CLS] token "
                "among the patches, so they form no grid; set it to 'default'"
            )
        check_at_hand(model.multi_modal_projector, "the projector", model)
        depth = vision.num_hidden_layers
        return ProjectorSite(
            old=model.multi_modal_projector,
            layers=None,
            grid=patch_grid(vision),
            dim=vision.hidden_size,
            hidden=config.text_config.hidden_size,
            depth=depth,
            levels=hidden_states_of(config.vision_feature_layer, depth),
        )

    def projector_changes(
        self, model: nn.Module, levels: tuple[int, ...], grid: tuple[int, int], scale_factor: int
    ) -> ProjectorChanges:
        now, then = model.config.image_seq_length, grid[0] * grid[1] // scale_factor**2
        return ProjectorChanges(
            config={"vision_feature_layer": -1, "image_seq_length": then},
            counted={"image_seq_length": (now, then)},
            shared={"image_token_id": model.config.image_token_id},
        )

    def follow_projector(self, edits: Edits, model: nn.Module, levels: tuple[int, ...]) -> None:
        """Let the tower give these levels, and what merges patches before the projector leave them as they are."""
        edits.set_attribute(model, "pixel_shuffle", _unmerged)
        edits.wrap_method(model, "get_image_features", _Levels(levels))
        edits.after(self.tower(model), _give_levels)


_LEVELS = "vltok_levels"  # keyword of the tower's call: the hidden states that stand in for the last one


class _Levels(MethodWrapper):
    """Asks the tower for several levels, as the model takes the last one alone."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        self.levels = levels

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **{**kwargs, "output_hidden_states": True, _LEVELS: self.levels})


def _give_levels(tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """After the tower: put the levels that were asked for, concatenated on channels, in the place of the last one."""
    if _LEVELS in kwargs:
        output.last_hidden_state = torch.cat([output.hidden_states[level] for level in kwargs[_LEVELS]], dim=-1)


def _unmerged(patches: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """In the place of what merges patches: they stay as they are, (B, H, W, C)."""
    return patches
