"""The checkpoint that most tests convert, what it is made from, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert.official import CLIP, LM, SCALE, Official, official_projector, write
from tiny import sharpen
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from vltok.convert.token_packer import convert


@pytest.fixture(scope="session")
def official() -> Official:
    vision = CLIPVisionConfig(**CLIP)
    text = CLIPTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, intermediate_size=8)
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 1
    config = {**LM, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "rope_scaling": None}
    config |= {"scale_factor": SCALE, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 16}
    config |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "tokenpacker"}
    config |= {"use_cache": False, "torch_dtype": "float32", "mm_use_im_start_end": False}
    return Official(
        sharpen(LlamaForCausalLM(LlamaConfig(**LM)), 1),
        sharpen(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())), 2),
        official_projector(),
        config,
    )


@pytest.fixture(scope="session")
def clip_folder(official, tmp_path_factory) -> Path:
    """A whole CLIP, text half and all."""
    folder = tmp_path_factory.mktemp("clip")
    official.clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(official, tmp_path_factory) -> Path:
    """A checkpoint in three .bin files, without a tower."""
    folder = tmp_path_factory.mktemp("official") / "TokenPacker"
    return write(folder, official.config, official.weights(), "sharded bin")


@pytest.fixture(scope="session")
def converted(source, clip_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(source, out, vision_tower=clip_folder)
    return out
