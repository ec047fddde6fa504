"""TowerFamily, the base of the vision towers: where blocks, patches and prefix tokens of a ViT are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vltok.engine.guard import ATTENTION_GUARD


class TowerFamily:
    """A family is stateless: everything it knows it reads from the tower it is given."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    model_classes: ClassVar[tuple[str, ...]]
    # What people are told, see `vltok.families.support.TowerSupport`; tests hold it against tiny models.
    methods: ClassVar[tuple[str, ...]] = ("SOFT", "TAP", "ADL")
    refuses: ClassVar[str] = ""
    returns_maps: ClassVar[bool] = True  # attention modules return (tokens, attention map or None)
    first_norm: ClassVar[str] = "norm1"  # child of a block that normalises what attends

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        """The blocks, first one first."""
        return max((module for module in tower.modules() if isinstance(module, nn.ModuleList)), key=len)

    def patch_layer(self, tower: nn.Module) -> nn.Module:
        """The convolution that makes patches of pixels: the first one."""
        return next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None)

    def grid(self, tower: nn.Module) -> tuple[int, int]:
        """Patches of a picture of the size the tower was made for."""
        size, patch = (_pair(getattr(tower.config, name)) for name in ("image_size", "patch_size"))
        return size[0] // patch[0], size[1] // patch[1]

    def dim(self, tower: nn.Module) -> int:
        """Width of the tokens."""
        return tower.config.hidden_size

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        """Tokens before those of the patches."""
        return 1

    def config(self, tower: nn.Module, model: nn.Module) -> Any:
        """The config that is saved with the tower in this model, or None where there is none."""
        return tower.config

    def guard(self, config: Any) -> dict[str, Any]:
        """Fields of that config that keep a model from being built from it, with what to put there."""
        return {"hidden_act": ATTENTION_GUARD}

    def shown_maps(self, tower: nn.Module) -> Sequence[nn.Module]:
        """Dropout layers that the attention maps of the blocks go through; none where queries and keys say it all."""
        return ()

    def check_norm(self, block: nn.Module) -> None:
        """Raise UnsupportedModelError if `first_norm` stands elsewhere than before the attention."""

    def check_patches(self, tower: nn.Module) -> None:
        """Raise UnsupportedModelError if the tokens of a picture's patches don't all reach the blocks."""

    def check_attention(self, tower: nn.Module) -> None:
        """Raise UnsupportedModelError if attention in this tower is more than its attention modules compute."""


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
