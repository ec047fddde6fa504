"""Vision towers of transformers whose pictures are all of one size: CLIP, SigLIP, ViT, DINOv2, InternViT and others."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.errors import UnsupportedModelError
from vltok.families.towers.base import TowerFamily


class Clip(TowerFamily):
    """CLIP: a [CLS] token before the patches."""

    name = "clip"
    title = "CLIP"
    model_classes = ("CLIPVisionModel",)
    first_norm, second_norm = "layer_norm1", "layer_norm2"


class PatchesAlone(TowerFamily):
    """Patches alone, as in SigLIP.

    Args:
        name: The family's name.
        title: What people call it.
        model_class: Name of the tower's class.
        norms: Children of a block that normalise what attends, and what enters the MLP.
        mlp: The MLP.
        has_maps: Whether the tower lays its tokens out as maps.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model_class: str,
        norms: tuple[str, str] = ("layer_norm1", "layer_norm2"),
        mlp: str = "mlp",
        has_maps: bool = False,
    ) -> None:
        self.name, self.title, self.model_classes, self.mlp = name, title, (model_class,), mlp
        self.first_norm, self.second_norm = norms
        self._has_maps = has_maps

    def check_merging(self, tower: nn.Module) -> None:
        if self._has_maps:
            raise _lays_out_maps(tower, "merge tokens in another tower, such as CLIP or SigLIP")

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


class ViT(TowerFamily):
    """ViT: a [CLS] token before the patches."""

    name = "vit"
    title = "ViT"
    model_classes = ("ViTModel",)
    first_norm, second_norm = "layernorm_before", "layernorm_after"


class InternViT(TowerFamily):
    """InternViT: a [CLS] token before the patches; queries and keys may be normalised.

    Args:
        name: The family's name.
        title: What people call it.
        model_class: Name of the tower's class.
    """

    first_norm, second_norm = "layernorm_before", "layernorm_after"
    refuses = "SOFT where queries and keys are normalised"

    def __init__(self, name: str, title: str, model_class: str) -> None:
        self.name, self.title, self.model_classes = name, title, (model_class,)


class Dinov2(TowerFamily):
    """DINOv2, also as a backbone: a [CLS] token before the patches."""

    name = "dinov2"
    title = "DINOv2"
    model_classes = ("Dinov2Model", "Dinov2Backbone")

    def check_merging(self, tower: nn.Module) -> None:
        if hasattr(tower, "out_features") and tower.config.reshape_hidden_states:
            raise _lays_out_maps(tower, "load it with reshape_hidden_states=False")

    def guard(self, config: Any) -> dict[str, Any]:
        # With SwiGLU layers no activation is looked up by name; layers of negative width can't be built either.
        return {"mlp_ratio": -1} if config.use_swiglu_ffn else super().guard(config)


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with registers: [CLS] and the registers before the patches."""

    name = "dinov2_with_registers"
    title = "DINOv2 with registers"
    model_classes = ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone")

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 1 + tower.config.num_register_tokens


def _lays_out_maps(tower: nn.Module, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(tower).__name__} lays its tokens out as maps, which merged tokens don't form; {remedy}"
    )
