"""The vision towers of transformers that vltok knows: CLIP, SigLIP, ViT, DINOv2."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.families.towers.base import TowerFamily


class Clip(TowerFamily):
    """CLIP: a [CLS] token before the patches."""

    name = "clip"
    title = "CLIP"
    model_classes = ("CLIPVisionModel",)
    first_norm = "layer_norm1"


class Siglip(TowerFamily):
    """SigLIP: patches alone."""

    name = "siglip"
    title = "SigLIP"
    model_classes = ("SiglipVisionModel",)
    first_norm = "layer_norm1"

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


class ViT(TowerFamily):
    """ViT: a [CLS] token before the patches."""

    name = "vit"
    title = "ViT"
    model_classes = ("ViTModel",)
    first_norm = "layernorm_before"


class Dinov2(TowerFamily):
    """DINOv2, also as a backbone: a [CLS] token before the patches."""

    name = "dinov2"
    title = "DINOv2"
    model_classes = ("Dinov2Model", "Dinov2Backbone")

    def guard(self, config: Any) -> dict[str, Any]:
        return _guard_of_dinov2(config) or super().guard(config)


class Dinov2WithRegisters(TowerFamily):
    """DINOv2 with registers: [CLS] and the registers before the patches."""

    name = "dinov2_with_registers"
    title = "DINOv2 with registers"
    model_classes = ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone")

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 1 + tower.config.num_register_tokens

    def guard(self, config: Any) -> dict[str, Any]:
        return _guard_of_dinov2(config) or super().guard(config)


def _guard_of_dinov2(config: Any) -> dict[str, Any]:
    """With SwiGLU layers no activation is looked up by name; layers of negative width can't be built either."""
    return {"mlp_ratio": -1} if config.use_swiglu_ffn else {}
