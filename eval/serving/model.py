"""A LLaVA-1.5 layout for timing: a config and a processor in a folder, to be loaded with random weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from eval.canvas.model import build_tokenizer

PATCH = 14


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. The default tower has the share of the work that CLIP L/14-336 has in LLaVA-1.5-7B, some 4 %.

    Attributes:
        layers: Decoder layers.
        width: Width of the decoder, of heads of 64.
        tower_layers: Layers of the vision tower.
        tower_width: Its width, of heads of 64.
        side: Patches along the side of an image.
    """

    layers: int = 24
    width: int = 1024
    tower_layers: int = 12
    tower_width: int = 256
    side: int = 24


def write(shape: Shape, folder: Path) -> None:
    """Write the config and the processor of a model of this shape, without weights."""
    tokenizer = build_tokenizer(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
    pixels = PATCH * shape.side
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_width,
            intermediate_size=4 * shape.tower_width,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_width // 64,
            image_size=pixels,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.width * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            num_key_value_heads=shape.width // 64,
            head_dim=64,
            max_position_embeddings=4096,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=shape.side**2,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    square = {"height": pixels, "width": pixels}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def described(shape: Shape) -> dict[str, Any]:
    """The sizes for a table or a file."""
    return {**asdict(shape), "visual_tokens": shape.side**2}
