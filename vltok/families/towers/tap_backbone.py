"""The backbones of TAP's paper, which have its pooling and show their attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vltok.families.towers.base import TowerFamily


class TapBackbone(TowerFamily):
    """tap_fan_base_16_p4_hybrid and tap_rvt_base_plus, for the loss that they were trained with."""

    name = "tap_backbone"
    title = "TAP's backbones, of vltok.models"
    methods = ("ADL",)
    model_classes = ("TapBackbone",)
    returns_maps = False

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return tower.blocks

    def grid(self, tower: nn.Module) -> tuple[int, int]:
        height, width = tower.pretrained_cfg["input_size"][1:]
        return height // 16, width // 16

    def dim(self, tower: nn.Module) -> int:
        return tower.num_features

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0

    def config(self, tower: nn.Module, model: nn.Module) -> Any:
        return None

    def shown_maps(self, tower: nn.Module) -> Sequence[nn.Module]:
        return [attention.attn_drop for attention in tower.token_attentions()]
