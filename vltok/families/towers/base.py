"""TowerFamily, the base of the vision towers: where blocks, patches and prefix tokens of a ViT are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from vltok.engine.guard import ATTENTION_GUARD
from vltok.engine.tower_layout import Layout, patch_grid
from vltok.errors import UnsupportedModelError


class TowerFamily:
    """A family is stateless: everything it knows it reads from the tower it is given."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    model_classes: ClassVar[tuple[str, ...]]
    # What people are told, see `vltok.families.support.TowerSupport`; tests hold it against tiny models.
    methods: ClassVar[tuple[str, ...]] = ("SOFT", "TAP", "ADL")
    refuses: ClassVar[str] = ""
    returns_maps: ClassVar[bool] = True  # attention modules return (tokens, attention map or None)
    # Children of a block: what normalises the tokens that attend, and those that enter the MLP, and the MLP.
    first_norm: ClassVar[str] = "norm1"
    second_norm: ClassVar[str] = "norm2"
    mlp: ClassVar[str] = "mlp"
    # Whether pictures are padded, or stand in one row, and masks say no more than which tokens are of one picture.
    is_masked: ClassVar[bool] = False

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        """The blocks, first one first."""
        return max((module for module in tower.modules() if isinstance(module, nn.ModuleList)), key=len)

    def patch_layer(self, tower: nn.Module) -> nn.Module | None:
        """What makes patches of pixels, whose call says where they are, see `layout`: the first convolution.

        None if there is no such part.
        """
        return next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None)

    def layout(self, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> Layout:
        """Where pictures are among the tokens, as a call of the patch layer tells: by its output, (B, C, H, W)."""
        return output.shape[-2], output.shape[-1]

    def grid(self, tower: nn.Module) -> tuple[int, int]:
        """Patches of a picture of the size the tower was made for."""
        return patch_grid(tower.config)

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

    def check_replaceable(self, tower: nn.Module) -> None:
        """Raise UnsupportedModelError if attention among all tokens of a row can't stand in for that of this tower."""
        if self.is_masked:
            raise _needs_masks(tower, "its attention can't be replaced; it can", "CLIP, SigLIP and InternViT")

    def check_merging(self, tower: nn.Module) -> None:
        """Raise UnsupportedModelError if blocks, or what follows them, need all tokens of a picture."""
        if self.is_masked:
            raise _needs_masks(tower, "tokens can't be merged in it; they can", "CLIP, SigLIP and DINOv2")

    def check_scores(self, tower: nn.Module) -> None:
        """Raise UnsupportedModelError if queries and keys don't show what this tower attends to."""

    def turn(
        self, attention: nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, (B, heads, N, d), as their products are taken, given what the attention was called with."""
        return query, key


def _needs_masks(tower: nn.Module, refused: str, others: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(tower).__name__} takes images of several sizes at once, padded or in one row, and tells them apart by "
        f"masks, so {refused} in towers whose images are all of one size, such as {others}"
    )
