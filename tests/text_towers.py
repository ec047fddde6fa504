"""A tiny CLIP model with its real tokenizer, made offline, whose vision tower is as wide as those of tests/tiny.py."""

from __future__ import annotations

from typing import Any

from tiny import TOWER, sharpen
from torch import nn

DIGITS = list(map(str, range(10)))
VOCABULARY = ["w", *DIGITS, "w</w>", *(f"{digit}</w>" for digit in DIGITS), "<|startoftext|>", "<|endoftext|>"]
BEGIN, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1


def clip_tokenizer() -> Any:
    """It reads w12 as three words: w, 1, 2."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)}, merges=[])


def clip_model(width: int = TOWER["hidden_size"], end: int = END, length: int = 77, seed: int = 5) -> nn.Module:
    """A CLIP model with sharp weights.

    Args:
        width: Channels of its vision tower.
        end: What its config says that marks the end of a text; the first releases say 2.
        length: Words that its text tower reads at most.
        seed: Of its weights.
    """
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": length}
    text |= {"bos_token_id": BEGIN, "eos_token_id": end, "pad_token_id": END}
    vision = {**TOWER, "hidden_size": width, "image_size": 56, "patch_size": 14}
    return sharpen(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), seed)
