"""Floating-point operations of each part by a closed formula, see docs/costs.md.

A product of matrices is 2 operations for each multiplication, and attention counts whole: kernels that skip what a
causal mask hides do up to half of its work. Norms, activations, softmax and the picking of tokens are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eval.cost.parts import find_parts

KNOWN = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")  # model types of which the formula is checked


@dataclass(frozen=True)
class Flops:
    """Operations of an answer: of each part before the first token, and of the first token decoded then."""

    tower: int
    projector: int
    prefill: int
    decode: int


def count(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: Sequence[int]) -> Flops:
    """Count for a prompt with one image.

    Args:
        model: One of a type in `KNOWN`; on the meta device, too.
        inputs: What it is given, `pixel_values` and `image_grid_thw` of which say how large the image is.
        tokens: Tokens that each decoder layer works on in the prefill.

    Raises:
        ValueError: If the model is of another type, or has another number of layers.
    """
    if model.config.model_type not in KNOWN:
        raise ValueError(f"operations are counted for {', '.join(KNOWN)}, got {model.config.model_type}")
    text, parts = model.config.get_text_config(), find_parts(model)
    layers = list(parts.decoder.layers)
    if len(layers) != len(tokens):
        raise ValueError(f"the decoder has {len(layers)} layers, got tokens of {len(tokens)}")
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    head = 2 * weights(model.get_output_embeddings())
    each = [2 * weights(layer) for layer in layers]
    prefill = sum(own * t + 4 * width * t * t for own, t in zip(each, tokens, strict=True)) + head
    decode = sum(own + 4 * width * (t + 1) for own, t in zip(each, tokens, strict=True)) + head

    rows, seen, patches = _tower_rows(model.config, inputs)
    vision = model.config.vision_config
    projecting = sum(map(weights, parts.projector))
    inside = {id(module) for each in parts.projector for module in each.modules()}
    embedding = sum(
        module.weight.numel() for module in parts.tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)
    )
    linear = weights(parts.tower, inside) - embedding
    tower = 2 * (linear * rows + embedding * patches) + 4 * vision.hidden_size * sum(seen)
    merged = getattr(vision, "spatial_merge_size", 1) ** 2
    return Flops(tower, 2 * projecting * patches // merged, prefill, decode)


def weights(module: nn.Module, but: frozenset[int] | set[int] = frozenset()) -> int:
    """Weights of the linear layers and convolutions, biases and modules with an id in `but` left out."""
    multiplying = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, multiplying) and id(m) not in but)


def _tower_rows(config, inputs: dict[str, torch.Tensor]) -> tuple[int, list[int], int]:
    """Rows of the tower's products, squares of the rows that attend to each other in each layer, and patches."""
    vision = config.vision_config
    if "image_grid_thw" not in inputs:
        tiles, (height, width) = inputs["pixel_values"].shape[:-3].numel(), inputs["pixel_values"].shape[-2:]
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        return tiles * (patches + 1), [tiles * (patches + 1) ** 2] * vision.num_hidden_layers, tiles * patches
    height, width = (int(each) for each in inputs["image_grid_thw"][0, 1:])
    patches, whole = height * width, getattr(vision, "fullatt_block_indexes", None)
    near = patches**2
    if whole is not None:
        step = vision.window_size // vision.patch_size
        along = [sum(min(step, n - k) ** 2 for k in range(0, n, step)) for n in (height, width)]
        near = along[0] * along[1]
    seen = [patches**2 if whole is None or layer in whole else near for layer in range(vision.depth)]
    return patches, seen, patches
