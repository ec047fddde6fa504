"""SOFT's vision transformers, by name for timm: soft_tiny ... soft_huge, soft_norm_tiny ... soft_norm_huge.

Papers: https://arxiv.org/abs/2110.11945 (SOFT), https://arxiv.org/abs/2207.03341 (SOFT-Norm). State dicts have the
released names, so that released checkpoints load, each from a file, as nothing is downloaded:

timm.create_model("soft_tiny", checkpoint_path="soft_tiny.pth")
timm.create_model("soft_tiny", pretrained=True, pretrained_cfg_overlay={"file": "soft_tiny.pth"}, features_only=True)

The second way also takes `img_size`, `in_chans` and `num_classes` that are not those of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vltok.models.soft_transformer import SoftTransformer
from vltok.models.weights import check_weights

WIDTHS = (64, 128, 320, 512)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (1, 2, 3, 2), "embed_dims": WIDTHS},
    "small": {"depths": (1, 3, 20, 4), "embed_dims": WIDTHS},
    "medium": {"depths": (1, 3, 29, 5), "embed_dims": (64, 128, 288, 512)},
    "large": {"depths": (1, 3, 40, 5), "embed_dims": WIDTHS},
    "huge": {"depths": (1, 5, 49, 5), "embed_dims": (64, 128, 352, 512)},
}
CONFIG = {
    "input_size": (3, 224, 224),
    "min_input_size": (3, 29, 29),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "first_conv": "patch_embed1.proj.0",
    "classifier": "head",
    "license": "mit",
    "origin_url": "https://github.com/fudan-zvg/SOFT",
}
NAMES = [f"{kind}_{size}" for kind in ("soft", "soft_norm") for size in SIZES]
default_cfgs = generate_default_cfgs({name: dict(CONFIG) for name in NAMES})


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SoftTransformer) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to a model for pictures of another size, by resizing its position embeddings.

    Args:
        state_dict: Weights under the released names, or a training checkpoint that holds them as "model".
        model: What they are for.

    Returns:
        The weights. Embeddings that are not of a square picture stay as they are.
    """
    weights = dict(state_dict.get("model", state_dict))
    for name, (grid, prefix) in model.position_grids().items():
        rows = weights[name].shape[1] if name in weights else 0
        if rows not in (0, grid[0] * grid[1] + prefix) and math.isqrt(rows - prefix) ** 2 == rows - prefix:
            weights[name] = resample_abs_pos_embed(weights[name], grid, None, prefix, "bilinear", antialias=False)
    return weights


def _create(name: str, pretrained: bool, **kwargs: Any) -> SoftTransformer:
    if pretrained:
        check_weights(name, kwargs)
    kind, _, size = name.rpartition("_")
    return build_model_with_cfg(
        SoftTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**SIZES[size], "normalize": kind == "soft_norm", **kwargs},
    )


@register_model
def soft_tiny(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Tiny: 13 M parameters, published top-1 79.3."""
    return _create("soft_tiny", pretrained, **kwargs)


@register_model
def soft_small(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Small as the released code builds it, 39 M parameters.

    The papers' tables (24 M, 3.3 GFLOPs, top-1 82.2) fit `depths=(1, 3, 7, 4)`.
    """
    return _create("soft_small", pretrained, **kwargs)


@register_model
def soft_medium(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Medium: 45 M parameters, published top-1 82.9."""
    return _create("soft_medium", pretrained, **kwargs)


@register_model
def soft_large(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Large: 64 M parameters, published top-1 83.1."""
    return _create("soft_large", pretrained, **kwargs)


@register_model
def soft_huge(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Huge: 87 M parameters, published top-1 83.3."""
    return _create("soft_huge", pretrained, **kwargs)


@register_model
def soft_norm_tiny(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Norm-Tiny: 13 M parameters, published top-1 79.4."""
    return _create("soft_norm_tiny", pretrained, **kwargs)


@register_model
def soft_norm_small(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Norm-Small as the released code builds it, 39 M parameters.

    The papers' tables (24 M, 3.3 GFLOPs, top-1 82.4) fit `depths=(1, 3, 7, 4)`.
    """
    return _create("soft_norm_small", pretrained, **kwargs)


@register_model
def soft_norm_medium(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Norm-Medium: 45 M parameters, published top-1 83.1."""
    return _create("soft_norm_medium", pretrained, **kwargs)


@register_model
def soft_norm_large(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Norm-Large: 64 M parameters, published top-1 83.3."""
    return _create("soft_norm_large", pretrained, **kwargs)


@register_model
def soft_norm_huge(pretrained: bool = False, **kwargs: Any) -> SoftTransformer:
    """SOFT-Norm-Huge: 87 M parameters, published top-1 83.4."""
    return _create("soft_norm_huge", pretrained, **kwargs)
