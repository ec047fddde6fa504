"""Models of a named shape with random weights, scaled down, and prompts with one image for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

IMAGE, VIDEO, START, END, FIRST_WORD = 1, 2, 3, 4, 8  # ids
HEAD = 128  # width of a decoder's head


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        family: Model type in transformers.
        layers, heads, kv_heads, ffn, vocabulary: Of the decoder, whose heads are 128 wide.
        tower_layers, tower_heads, tower_head, tower_ffn: Of the vision tower; `tower_head` is the width of a head.
        side: Pixels along the side of the image that is asked about if nothing else is said.
        scale: What it is scaled by if nothing else is said.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tower_layers: int
    tower_heads: int
    tower_head: int
    tower_ffn: int
    side: int
    scale: float = 0.125

    def scaled(self, scale: float) -> Shape:
        """The shape with layers, heads and ffn times `scale`, and the vocabulary times its square.

        The width of heads, patches and image stay, and so do all counts of tokens. Weights of all parts shrink by about
        the cube, so their shares of the work stay; attention over T tokens shrinks by the square alone.
        """
        heads, kv_heads = _part(self.heads, scale), _part(self.kv_heads, scale)
        while heads % kv_heads:
            kv_heads -= 1
        return replace(
            self,
            layers=_part(self.layers, scale),
            heads=heads,
            kv_heads=kv_heads,
            ffn=_part(self.ffn, scale, 8),
            vocabulary=_part(self.vocabulary, scale**2, 64),
            tower_layers=_part(self.tower_layers, scale),
            tower_heads=_part(self.tower_heads, scale),
            tower_ffn=_part(self.tower_ffn, scale, 8),
        )

    def __str__(self) -> str:
        return (
            f"{self.family}, decoder {self.layers} x {self.heads * HEAD} (heads {self.heads}/{self.kv_heads}, ffn "
            f"{self.ffn}, vocabulary {self.vocabulary}), tower {self.tower_layers} x "
            f"{self.tower_heads * self.tower_head} (ffn {self.tower_ffn})"
        )


CLIP = {"tower_layers": 24, "tower_heads": 16, "tower_head": 64, "tower_ffn": 4096}
LLAMA = {"layers": 32, "heads": 32, "kv_heads": 32, "ffn": 11008}
SHAPES = {
    "llava-1.5-7b": Shape("llava", **LLAMA, vocabulary=32064, **CLIP, side=336),
    "llava-next-7b": Shape("llava_next", **LLAMA, vocabulary=32064, **CLIP, side=672),  # the one with Vicuna
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", 28, 28, 4, 18944, 152064, 32, 16, 80, 3420, side=672),
    "qwen3-vl-8b": Shape("qwen3_vl", 36, 32, 8, 12288, 151936, 27, 16, 72, 4304, side=672),
    # A tower so small that equal work in it doesn't hide what pruning itself costs.
    "overhead": Shape("llava", 24, 8, 8, 2816, 32000, 2, 1, 64, 128, side=336, scale=1.0),
}


def build(shape: Shape, attention: str = "sdpa") -> nn.Module:
    """A model with random weights on torch's current default device, in eval mode; "meta" gives sizes alone."""
    torch.manual_seed(0)
    config = (_llava if shape.family.startswith("llava") else _qwen)(shape)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model


def prompt(model: nn.Module, side: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """A prompt of random words, a quarter of them before an image of noise.

    Raises:
        ValueError: If the model takes no square images of that side.
    """
    config = model.config
    images = (_tiles if config.model_type.startswith("llava") else _patches)(config, side)
    images = {name: value.to(model.device) for name, value in images.items()}
    with torch.no_grad():
        like = {**images, "pixel_values": images["pixel_values"].to(model.dtype)}
        visual = sum(map(len, features(model, like)))
    words = torch.randint(FIRST_WORD, config.text_config.vocab_size, (text_tokens,))
    image = torch.full((visual,), IMAGE)
    if not config.model_type.startswith("llava"):
        image = torch.cat([torch.tensor([START]), image, torch.tensor([END])])
    ids = torch.cat([words[: text_tokens // 4], image, words[text_tokens // 4 :]])[None].to(model.device)
    told = {} if config.model_type.startswith("llava") else {"mm_token_type_ids": (ids == IMAGE).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **like, **told}


def features(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Run the vision tower and the projector: the visual tokens of each image or tile, (n, D)."""
    passed = ("pixel_values", "image_sizes", "image_grid_thw")
    found = model.get_image_features(**{name: inputs[name] for name in passed if name in inputs}).pooler_output
    return [each.flatten(0, -2) for each in (found if isinstance(found, list | tuple) else [found])]


def _part(count: int, scale: float, step: int = 1) -> int:
    return max(1, round(count * scale / step)) * step


def _llava(shape: Shape) -> Any:
    text = transformers.LlamaConfig(**_decoder(shape))
    tower = transformers.CLIPVisionConfig(
        hidden_size=shape.tower_heads * shape.tower_head,
        intermediate_size=shape.tower_ffn,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=336,
        patch_size=14,
    )
    kind = transformers.LlavaConfig if shape.family == "llava" else transformers.LlavaNextConfig
    return kind(vision_config=tower, text_config=text, image_token_index=IMAGE)


def _qwen(shape: Shape) -> Any:
    is_third = shape.family == "qwen3_vl"
    tower = {
        "hidden_size": shape.tower_heads * shape.tower_head,
        "intermediate_size": shape.tower_ffn,
        "depth": shape.tower_layers,
        "num_heads": shape.tower_heads,
        "out_hidden_size": shape.heads * HEAD,
        "patch_size": 16 if is_third else 14,
    }
    if is_third:  # features of a few depths, 3 in 27 layers, are projected besides
        count = max(1, round(shape.tower_layers / 9))
        tower["deepstack_visual_indexes"] = [shape.tower_layers * k // (count + 1) for k in range(1, count + 1)]
    else:  # one layer in eight attends over the whole image
        count = max(1, round(shape.tower_layers / 8))
        tower["fullatt_block_indexes"] = [shape.tower_layers * k // count - 1 for k in range(1, count + 1)]
        tower["window_size"] = 112
    sections = (
        {"mrope_section": [24, 20, 20], "mrope_interleaved": True} if is_third else {"mrope_section": [16, 24, 24]}
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, **sections}
    kind = transformers.Qwen3VLConfig if is_third else transformers.Qwen2_5_VLConfig
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return kind(vision_config=tower, text_config=_decoder(shape) | {"rope_parameters": rope}, **ids)


def _decoder(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.heads * HEAD,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD,
        "max_position_embeddings": 32768,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _tiles(config: Any, side: int) -> dict[str, torch.Tensor]:
    own = config.vision_config.image_size
    if config.model_type == "llava":
        if side != own:
            raise ValueError(f"this model takes images of {own} x {own} pixels, got {side}")
        return {"pixel_values": torch.randn(1, 3, own, own)}
    count = image_size_to_num_patches([side, side], config.image_grid_pinpoints, own)
    return {"pixel_values": torch.randn(1, count, 3, own, own), "image_sizes": torch.tensor([[side, side]])}


def _patches(config: Any, side: int) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    step = vision.patch_size * vision.spatial_merge_size
    if side % step or not side:
        raise ValueError(f"this model takes images whose side is a multiple of {step} pixels, got {side}")
    count = side // vision.patch_size
    pixels = torch.randn(count * count, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, count, count]])}
