"""Vision towers of transformers whose pictures are all of one size: CLIP, SigLIP, ViT, DINOv2, InternViT and others."""

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


class PatchesAlone(TowerFamily):
    """Patches alone, as in SigLIP.

    Args:
        name: The family's name.
        title: What people call it.
        model_class: Name of the tower's class.
        first_norm: Child of a block that normalises what attends.
    """

    def __init__(self, name: str, title: str, model_class: str, first_norm: str = "layer_norm1") -> None:
        self.name, self.title, self.model_classes, self.first_norm = name, title, (model_class,), first_norm

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


class ViT(TowerFamily):
    """ViT: a [CLS] token before the patches."""

    name = "vit"
    title = "ViT"
    model_classes = ("ViTModel",)
    first_norm = "layernorm_before"


class InternViT(TowerFamily):
    """InternViT: a [CLS] token before the patches; queries and keys may be normalised.

    Args:
        name: The family's name.
        title: What people call it.
        model_class: Name of the tower's class.
    """

    first_norm = "layernorm_before"
    refuses = "SOFT where queries and keys are normalised"

    def __init__(self, name: str, title: str, model_class: str) -> None:
        self.name, self.title, self.model_classes = name, title, (model_class,)


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
