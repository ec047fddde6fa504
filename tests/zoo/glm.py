"""Tiny models of the GLM-V, DeepSeek-VL, Janus, GOT-OCR2 and Aria families, with their real processors."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import transformers
from tiny import BOTH, IDS, SPECIALS, TEXT, TOWER, TinyFamily, tokenizer
from torch import nn

# In prompts of GLM-V also videos are written with image tokens.
GLM_SPECIALS = [*SPECIALS[:4], "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
GLM_SPECIALS += ["<|begin_of_video|>", "<|end_of_video|>"]
GLM_MARKS = {"image_token_id": 4, "video_token_id": 5, "image_start_token_id": 6, "image_end_token_id": 7}
GLM_MARKS |= {"video_start_token_id": 8, "video_end_token_id": 9}
GLM_TOWER = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
GLM_TOWER |= {"image_size": 32, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5}
MOE = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}


def _glm(attention: str, kind: str = "Glm4v", **text: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=dict(GLM_TOWER),
        text_config={**TEXT, "rope_parameters": dict(GLM_ROPE), **text},
        attn_implementation=attention,
        **GLM_MARKS,
        **IDS,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _glm_processor(kind: str = "Glm4v") -> Any:
    parts = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    parts["size"] = {"shortest_edge": 64, "longest_edge": 8192}
    return getattr(transformers, f"{kind}Processor")(
        image_processor=getattr(transformers, f"{kind}ImageProcessor")(**parts),
        tokenizer=tokenizer(GLM_SPECIALS),
        video_processor=getattr(transformers, f"{kind}VideoProcessor")(do_sample_frames=False, **parts),
    )


def _deepseek(attention: str) -> nn.Module:
    config = transformers.DeepseekVLConfig(
        vision_config={**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        text_config=dict(TEXT),
        image_token_id=4,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


def _deepseek_processor() -> Any:
    return transformers.DeepseekVLProcessor(
        image_processor=transformers.DeepseekVLImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer(extra_special_tokens={"image_token": "<image>"}),
        num_image_tokens=16,
    )


# A SAM tower: windows of 4 x 4 patches in the first layer, the whole picture in the other two.
SAM = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48, "image_size": 64}
SAM |= {"patch_size": 4, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1, 2]}


def _deepseek_hybrid(attention: str) -> nn.Module:
    config = transformers.DeepseekVLHybridConfig(
        vision_config={**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        high_res_vision_config=dict(SAM),
        text_config=dict(TEXT),
        image_token_id=4,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config)


def _deepseek_hybrid_processor() -> Any:
    sizes = {"size": {"height": 56, "width": 56}, "high_res_size": {"height": 64, "width": 64}}
    return transformers.DeepseekVLHybridProcessor(
        image_processor=transformers.DeepseekVLHybridImageProcessor(**sizes),
        tokenizer=tokenizer(extra_special_tokens={"image_token": "<image>"}),
        num_image_tokens=16,
    )


JANUS_SPECIALS = [*SPECIALS, "<begin_of_image>", "<end_of_image>"]


def _janus(attention: str) -> nn.Module:
    tower = {"hidden_size": 32, "mlp_ratio": 1.5, "num_hidden_layers": 3, "num_attention_heads": 2, "depth": 2}
    painter = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    painter |= {"num_embeddings": 16, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64}
    config = transformers.JanusConfig(
        vision_config={**tower, "image_size": 56, "patch_size": 14, "projection_dim": 64, "num_image_tokens": 16},
        vq_config=painter,
        text_config=dict(TEXT),
        image_token_id=4,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.JanusForConditionalGeneration(config)


def _janus_processor() -> Any:
    special = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return transformers.JanusProcessor(
        image_processor=transformers.JanusImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer(JANUS_SPECIALS, extra_special_tokens=special),
        num_image_tokens=16,
    )


GOT_SPECIALS = [*SPECIALS[:4], "<imgpad>", "<img>", "</img>"]


def _got(attention: str) -> nn.Module:
    config = transformers.GotOcr2Config(
        vision_config=dict(SAM),
        text_config=dict(TEXT),
        image_token_index=4,
        image_seq_length=16,
        tie_word_embeddings=False,
        # The tower knows eager attention alone.
        attn_implementation={"": "eager", "vision_config": "eager", "text_config": attention},
    )
    return transformers.GotOcr2ForConditionalGeneration(config)


def _got_processor(**crops: Any) -> Any:
    processor = transformers.GotOcr2Processor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=tokenizer(GOT_SPECIALS),
    )
    processor.num_image_tokens = 16
    processor.images_kwargs = {**processor.images_kwargs, **crops}
    return processor


ARIA_SPECIALS = [*SPECIALS[:4], "<|img|>", "<fim_prefix>", "<fim_suffix>"]


def _aria(attention: str) -> nn.Module:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32}
    config = transformers.AriaConfig(
        # The processor makes pictures of 490 x 490 or 980 x 980 pixels: 49 patches, of which 16 tokens are made.
        vision_config={**TOWER, "image_size": 490, "patch_size": 70},
        text_config={**TEXT, **experts},
        projector_patch_to_query_dict={49: 16},
        image_token_index=4,
        attn_implementation=attention,
    )
    return transformers.AriaForConditionalGeneration(config)


def _aria_processor(**crops: Any) -> Any:
    processor = transformers.AriaProcessor(
        image_processor=transformers.AriaImageProcessor(max_image_size=490),
        tokenizer=tokenizer(ARIA_SPECIALS, extra_special_tokens={"image_token": "<|img|>"}),
        size_conversion={490: 16},
    )
    processor.images_kwargs = {"max_image_size": 490, **crops}
    return processor


GLM4V = TinyFamily(
    "glm4v",
    _glm,
    _glm_processor,
    "<|begin_of_image|><|image|><|end_of_image|>",
    (32, 24),
    (24, 40),
    False,
    (12, 15),
    axes=3,
    projects=False,
    video="<|begin_of_video|><|video|><|end_of_video|>",
    frames=4,  # two are one to the tower
    clip_tokens=24,
    mixes=False,  # image tokens stand for both
    unable=("copies",),
)
GLM4V_MOE = replace(GLM4V, name="glm4v_moe", build=functools.partial(_glm, kind="Glm4vMoe", **MOE))
GLM46V = replace(
    GLM4V,
    name="glm46v",
    build=functools.partial(_glm, kind="Glm46V"),
    processor=functools.partial(_glm_processor, "Glm46V"),
)
GLM46V_MOE = replace(
    GLM46V, variant="moe", build=functools.partial(_glm, kind="Glm46V", model_type="glm4v_moe_text", **MOE)
)
GLM_OCR = replace(GLM46V, name="glm_ocr", build=functools.partial(_glm, kind="GlmOcr"))
DEEPSEEK_VL = TinyFamily(
    "deepseek_vl",
    _deepseek,
    _deepseek_processor,
    "<image>",
    (56, 56),
    (80, 50),
    False,
    (16, 16),
    projects=False,
    tower=BOTH,
)
DEEPSEEK_VL_HYBRID = replace(
    DEEPSEEK_VL, name="deepseek_vl_hybrid", build=_deepseek_hybrid, processor=_deepseek_hybrid_processor
)
JANUS = replace(DEEPSEEK_VL, name="janus", build=_janus, processor=_janus_processor)
GOT_OCR2 = replace(
    DEEPSEEK_VL,
    name="got_ocr2",
    build=_got,
    processor=_got_processor,
    image="<img><imgpad></img>",
    size=(64, 64),
    tower=(),
    shows_patches=False,
    needs_images=True,
)
# 128 x 64: two crops and a thumbnail of 16 tokens each.
GOT_OCR2_CROPS = replace(
    GOT_OCR2,
    variant="crops",
    processor=functools.partial(_got_processor, crop_to_patches=True, max_patches=4),
    size=(128, 64),
    other_size=(64, 64),
    tokens=(48, 16),
)
ARIA = replace(
    DEEPSEEK_VL,
    name="aria",
    build=_aria,
    processor=_aria_processor,
    image="<fim_prefix><|img|><fim_suffix>",
    tower=("tap",),
    shows_patches=False,
)
# Two crops each: the processor counts the crops of all pictures alike.
ARIA_CROPS = replace(
    ARIA,
    variant="crops",
    processor=functools.partial(_aria_processor, split_image=True),
    size=(98, 49),
    other_size=(49, 98),
    tokens=(32, 32),
)
GLM = [GLM4V, GLM4V_MOE, GLM46V, GLM46V_MOE, GLM_OCR]
ROWS = [*GLM, DEEPSEEK_VL, DEEPSEEK_VL_HYBRID, JANUS, GOT_OCR2, GOT_OCR2_CROPS, ARIA, ARIA_CROPS]
