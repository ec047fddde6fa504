"""Tiny, randomly initialised models of the real classes with their real processors, all made offline from configs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(specials: Sequence[str] = SPECIALS, **extra: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows w0 ... w39."""
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    )


def picture(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """A colourful noise picture of (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def sharpen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights large enough that attention is peaked and each token matters; flat weights hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or parameter.dim() < 2:
                parameter.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
            else:
                fan_in = parameter[0].numel() if "embed" not in name else 1
                parameter.copy_(noise * 1.5 / fan_in**0.5)
    return model.eval()


@dataclass(frozen=True)
class TinyFamily:
    """One row of the family axis of the test matrix.

    Attributes:
        name: The family's name in vltok.
        build: Makes a model, given the attention implementation.
        processor: Makes the processor.
        image: What a prompt writes for an image.
        size: Size of a picture (width, height); `other_size` a second one, where the family allows several.
        has_cls: Whether the vision tower has a [CLS] token.
    """

    name: str
    build: Callable[..., nn.Module]
    processor: Callable[[], Any]
    image: str
    size: tuple[int, int]
    other_size: tuple[int, int]
    has_cls: bool

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A model with sharp weights, in eval mode."""
        return sharpen(self.build(attention), seed).to(dtype)

    def inputs(self, prompts: Sequence[str], images: Sequence[Image.Image] = (), padding_side: str = "left") -> Any:
        """Process prompts in which "<image>" stands for an image of `images`."""
        processor = self.processor()
        processor.tokenizer.padding_side = padding_side
        text = [prompt.replace("<image>", self.image) for prompt in prompts]
        return processor(text=text, images=list(images) or None, padding=True, return_tensors="pt")


def _llava(attention: str, tower: str = "clip") -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**sizes, image_size=56, patch_size=14)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_feature_layer=-2,
        attn_implementation=attention,
    )
    return LlavaForConditionalGeneration(config)


def _llava_processor(tower: str = "clip") -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
    )


LLAVA = TinyFamily("llava", _llava, _llava_processor, "<image>", (56, 56), (80, 50), True)
LLAVA_SIGLIP = TinyFamily(
    "llava",
    functools.partial(_llava, tower="siglip"),
    functools.partial(_llava_processor, "siglip"),
    "<image>",
    (56, 56),
    (80, 50),
    False,
)
