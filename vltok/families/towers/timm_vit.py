"""timm's ViTs: VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2 ...) and Eva."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vltok.engine.guard import ATTENTION_GUARD
from vltok.errors import UnsupportedModelError
from vltok.families.towers.base import TowerFamily


class VisionTransformer(TowerFamily):
    """A ViT of timm, with or without [CLS], distillation and register tokens."""

    name = "timm_vit"
    title = "ViTs of timm"
    model_classes = ("VisionTransformer",)
    returns_maps = False
    block_classes: ClassVar[tuple[str, ...]] = ("Block",)  # those that normalise, attend and add

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return tower.blocks

    def patch_layer(self, tower: nn.Module) -> nn.Module | None:
        layer = getattr(tower.patch_embed, "proj", None)
        return layer if isinstance(layer, nn.Conv2d) else None

    def grid(self, tower: nn.Module) -> tuple[int, int]:
        return tuple(tower.patch_embed.grid_size)

    def dim(self, tower: nn.Module) -> int:
        return tower.embed_dim

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return tower.num_prefix_tokens

    def config(self, tower: nn.Module, model: nn.Module) -> Any:
        """That of transformers' wrapper around the tower; timm's own models have none."""
        configs = [getattr(part, "config", None) for part in model.modules() if tower in part.children()]
        return next((config for config in configs if hasattr(config, "architecture")), None)

    def guard(self, config: Any) -> dict[str, Any]:
        return {"architecture": ATTENTION_GUARD}

    def check_patches(self, tower: nn.Module) -> None:
        if rate := getattr(getattr(tower, "patch_drop", None), "prob", 0):
            raise UnsupportedModelError(
                f"this vision tower drops patches while it trains (patch_drop_rate={rate}), so that the rest form no "
                "grid; make it with patch_drop_rate=0, or set model.patch_drop.prob = 0 first"
            )

    def check_norm(self, block: nn.Module) -> None:
        if not any(base.__name__ in self.block_classes for base in type(block).__mro__):
            raise UnsupportedModelError(
                f"{type(block).__name__} doesn't normalise tokens, attend and add, in this order, so there is no place "
                f"to pool or merge them; blocks that do are {', '.join(self.block_classes)} of timm"
            )


class Eva(VisionTransformer):
    """An EVA-like ViT of timm."""

    name = "timm_eva"
    title = "EVA of timm"
    refuses = "SOFT and ADL where positions are rotary"
    model_classes = ("Eva",)
    block_classes = ("EvaBlock",)

    def check_replaceable(self, tower: nn.Module) -> None:
        self.check_scores(tower)

    def check_merging(self, tower: nn.Module) -> None:
        if tower.rope is not None:
            raise UnsupportedModelError(
                "this Eva model tells its attention where every patch is, by rotary positions, so tokens can't be "
                "merged in it; they can in ViTs with position embeddings: VisionTransformer of timm, and Eva without "
                "rotary positions"
            )

    def check_scores(self, tower: nn.Module) -> None:
        if tower.rope is not None:
            raise UnsupportedModelError(
                "this Eva model tells its attention where tokens are, by rotary positions, so it can't be replaced; it "
                "can in ViTs with position embeddings: VisionTransformer of timm, and Eva without rotary positions"
            )
