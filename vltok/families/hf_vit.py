"""The vision towers of transformers that vltok knows: CLIP, SigLIP, ViT, DINOv2."""

from __future__ import annotations

from torch import nn

from vltok.families.tower import TowerFamily


class Clip(TowerFamily):
    """CLIP: a [CLS] token before the patches."""

    name = "clip"
    model_classes = ("CLIPVisionModel",)


class Siglip(TowerFamily):
    """SigLIP: patches alone."""

    name = "siglip"
    model_classes = ("SiglipVisionModel",)

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


class ViT(TowerFamily):
    """ViT: a [CLS] token before the patches."""

    name = "vit"
    model_classes = ("ViTModel",)


class Dinov2(TowerFamily):
    """DINOv2, also as a backbone: a [CLS] token before the patches."""

    name = "dinov2"
    model_classes = ("Dinov2Model", "Dinov2Backbone")


class Dinov2WithRegisters(TowerFamily):
    """DINOv2 with registers: [CLS] and the registers before the patches."""

    name = "dinov2_with_registers"
    model_classes = ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone")

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 1 + tower.config.num_register_tokens
