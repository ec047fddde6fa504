"""Towers of transformers that take pictures of several sizes at once: SigLIP 2, Pixtral, and those of Idefics.

Their rows of tokens are padded, or one row holds several pictures, and masks keep each picture to itself.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vltok.engine.tower_layout import Layout, Place, layout_at
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.families.towers.base import TowerFamily


class Masked(TowerFamily):
    """A tower whose pictures are told apart by masks, and have no tokens but their patches."""

    is_masked = True
    methods = ("TAP", "ADL")

    def patch_layer(self, tower: nn.Module) -> nn.Module:
        return tower.embeddings

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


class Siglip2(Masked):
    """SigLIP 2 in its flexible form: patches come in rows, padded to the longest."""

    name = "siglip2"
    title = "SigLIP 2"
    model_classes = ("Siglip2VisionModel",)
    first_norm = "layer_norm1"

    def layout(self, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> Layout:
        shapes = _argument(args, kwargs, 1, "spatial_shapes").tolist()
        places = [Place(row, 0, width, (height, width)) for row, (height, width) in enumerate(shapes)]
        return layout_at(output.shape[:2], places)

    def grid(self, tower: nn.Module) -> tuple[int, int]:
        side = tower.embeddings.position_embedding_size
        return side, side


class Idefics(Masked):
    """The tower of Idefics and its kin: pictures are padded to the largest, to the right and below."""

    first_norm = "layer_norm1"

    def __init__(self, name: str, title: str, model_class: str) -> None:
        self.name, self.title, self.model_classes = name, title, (model_class,)

    def layout(self, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> Layout:
        mask = _argument(args, kwargs, 1, "patch_attention_mask")  # (B, H, W)
        grids = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1).tolist()
        places = [Place(row, 0, mask.shape[2], (height, width)) for row, (height, width) in enumerate(grids)]
        return layout_at(output.shape[:2], places)


class Pixtral(Masked):
    """Pixtral: all pictures stand in one row, and rotary positions say where their patches are."""

    name = "pixtral"
    title = "Pixtral"
    model_classes = ("PixtralVisionModel",)
    first_norm = "attention_norm"

    def patch_layer(self, tower: nn.Module) -> nn.Module:
        """What gets the places of all patches, right after these are made."""
        return tower.patch_positional_embedding

    def layout(self, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> Layout:
        tokens, places = args  # (1, N, C), and (N, 2); in older versions of transformers one number for both, (N,)
        if places.dim() == 1:
            most = part.config.image_size // part.config.patch_size  # columns
            places = torch.stack([places // most, places % most], dim=1)
        rows, columns = places.T.tolist()
        begins = [n for n, place in enumerate(zip(rows, columns, strict=True)) if place == (0, 0)]
        pictures = []
        for first, end in pairwise([*begins, len(rows)]):
            width = max(columns[first:end]) + 1
            grid = (rows[end - 1] + 1, width)
            if grid[0] * grid[1] != end - first:
                raise UnsupportedInputError(
                    f"an image of {end - first} patches is wider than the {part.config.image_size} pixels that this "
                    "vision tower was made for, which this version of transformers confuses; make it smaller"
                )
            pictures.append(Place(0, first, width, grid))
        return layout_at(tokens.shape[:2], pictures)

    def check_replaceable(self, tower: nn.Module) -> None:
        raise UnsupportedModelError(
            f"{type(tower).__name__} tells its attention where tokens are by rotary positions, and which are of one "
            "image by a mask, so its attention can't be replaced; it can in ViTs with position embeddings and "
            "images of one size, such as CLIP, SigLIP and InternViT"
        )

    def turn(
        self, attention: nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return rotate(query, key, *kwargs["position_embeddings"], unsqueeze_dim=0)


def _argument(args: tuple, kwargs: dict[str, Any], number: int, name: str) -> Any:
    return args[number] if len(args) > number else kwargs[name]
