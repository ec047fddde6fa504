"""Tiny models of the LFM3-VL, Step-3.7, HunYuan-VL, FastVLM, MiniCPM-V, Granite Docling and Gemma 3n families.

Each with its real processor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers
from tiny import BOTH, IDS, QWEN_SPECIALS, SPECIALS, STATES, TEXT, TOWER, WINDOW, TinyFamily, tokenizer
from torch import nn


def _lfm3(attention: str) -> nn.Module:
    tower = {**TOWER, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention", "conv"]}
    # Real decoders have twice as many convolutions as layers with attention, of which every second one has a window.
    layers = {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"], "sliding_window": WINDOW}
    config = transformers.Lfm3VlConfig(
        vision_config={**tower, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2},
        text_config={**TEXT, **layers, "head_dim": 16, "conv_L_cache": 4},
        projector_hidden_size=48,
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.Lfm3VlForConditionalGeneration(config)


def _lfm3_processor() -> Any:
    parts = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    parts["size"] = {"shortest_edge": 64, "longest_edge": 8192}
    return transformers.Lfm3VlProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**parts),
        tokenizer=tokenizer(QWEN_SPECIALS),
        video_processor=transformers.Qwen3VLVideoProcessor(do_sample_frames=False, **parts),
    )


STEP_SPECIALS = [*SPECIALS[:4], "<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>"]
STEP_SPECIALS += ["<patch_newline>"]


def _step(attention: str) -> nn.Module:
    # Layers with a window have more heads than the others.
    layers = {"layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window": WINDOW}
    layers |= {"num_sliding_attention_heads": 6, "head_dim": 16, "mlp_layer_types": ["dense", *["sparse"] * 3]}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32}
    config = transformers.Step3p7Config(
        vision_config={**TOWER, "image_size": 64, "patch_size": 4, "mlp_ratio": 1.5, "max_position_embeddings": 256},
        text_config={**TEXT, **layers, **experts},
        image_token_id=4,
        attn_implementation=attention,
    )
    return transformers.Step3p7ForConditionalGeneration(config)


def _step_processor() -> Any:
    image_processor = transformers.Step3p7ImageProcessor(size={"height": 64, "width": 64}, patch_size=32)
    image_processor.vision_patch_size = 4
    return transformers.Step3p7Processor(image_processor=image_processor, tokenizer=tokenizer(STEP_SPECIALS))


HUNYUAN_SPECIALS = [*SPECIALS[:4], "<image>", "<image_start>", "<image_end>"]


def _hunyuan(attention: str) -> nn.Module:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    config = transformers.HunYuanVLConfig(
        vision_config={**TOWER, "patch_size": 4, "max_image_size": 32, "min_image_size": 8, "out_hidden_size": 64},
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**rope, "mrope_section": [2, 2, 2, 2]}},
        image_token_id=4,
        im_start_id=5,
        im_end_id=6,
        im_newline_id=7,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.HunYuanVLForConditionalGeneration(config)


def _hunyuan_processor() -> Any:
    special = {"image_token": "<image>", "image_start_token": "<image_start>", "image_end_token": "<image_end>"}
    return transformers.HunYuanVLProcessor(
        image_processor=transformers.HunYuanVLImageProcessor(
            size={"shortest_edge": 64, "longest_edge": 8192}, patch_size=4, merge_size=2
        ),
        tokenizer=tokenizer(HUNYUAN_SPECIALS, extra_special_tokens=special),
    )


def _fast_vlm(attention: str) -> nn.Module:
    # The smallest of these towers, as it is: 128 x 128 pixels make 4 x 4 tokens.
    tower = {"architecture": "fastvit_t8", "model_args": {"inference_mode": True}, "hidden_size": 768}
    config = transformers.FastVlmConfig(
        vision_config={**tower, "model_type": "timm_wrapper", "do_pooling": True},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=4,
        attn_implementation={"": attention, "vision_config": "eager", "text_config": attention},
    )
    return transformers.FastVlmForConditionalGeneration(config)


def _fast_vlm_processor() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}
        ),
        tokenizer=tokenizer(),
        patch_size=32,
        vision_feature_select_strategy="full",
    )


MINICPM_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>"}
MINICPM_TOKENS |= {"image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>"}
MINICPM_TOKENS |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}


def _minicpm(attention: str) -> nn.Module:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    config = transformers.MiniCPMV4_6Config(
        vision_config={**TOWER, "image_size": 64, "patch_size": 4},
        text_config={**TEXT, **linear, "linear_value_head_dim": 16, "head_dim": 16},
        insert_layer_id=1,
        image_token_id=4,
        video_token_id=5,
        attn_implementation=attention,
        **IDS,
    )
    return transformers.MiniCPMV4_6ForConditionalGeneration(config)


def _minicpm_processor() -> Any:
    sizes = {"patch_size": 4, "scale_resolution": 64, "max_slice_nums": 4}
    return transformers.MiniCPMV4_6Processor(
        image_processor=transformers.MiniCPMV4_6ImageProcessor(**sizes),
        video_processor=transformers.MiniCPMV4_6VideoProcessor(do_sample_frames=False, slice_mode=False, **sizes),
        tokenizer=tokenizer([*SPECIALS[:4], *MINICPM_TOKENS.values()], extra_special_tokens=MINICPM_TOKENS),
    )


DOCLING_SPECIALS = [*SPECIALS, "<fake_token_around_image>", "<global-img>"]
DOCLING_SPECIALS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]


def _docling(attention: str) -> nn.Module:
    # Not those of the checkpoints, with which random weights would attend to all tokens alike.
    scales = {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    config = transformers.GraniteDoclingConfig(
        vision_config={
            **TOWER,
            "image_size": 64,
            "patch_size": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config={**TEXT, **scales},
        image_token_id=4,
        tie_word_embeddings=False,
        attn_implementation=attention,
        **IDS,
    )
    return transformers.GraniteDoclingForConditionalGeneration(config)


def _docling_processor() -> Any:
    return transformers.GraniteDoclingProcessor(
        image_processor=transformers.GraniteDoclingImageProcessor(size={"height": 64, "width": 64}, max_patches=4),
        tokenizer=tokenizer(DOCLING_SPECIALS, extra_special_tokens={"image_token": "<image>"}),
        image_seq_len=16,
    )


GEMMA_TOKENS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
GEMMA_TOKENS |= {"audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}


def _gemma3n(attention: str) -> nn.Module:
    # Real decoders have four layers with windows for each without, and let the last ones share keys.
    # Of six layers the last two take the keys of the two before.
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": WINDOW, "head_dim": 16}
    layers["num_hidden_layers"] = 6
    inputs = {"altup_num_inputs": 3, "vocab_size_per_layer_input": 56, "hidden_size_per_layer_input": 8}
    ears = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "input_feat_size": 16}
    config = transformers.Gemma3nConfig(
        text_config={**TEXT, **layers, **inputs, "laurel_rank": 8, "num_kv_shared_layers": 2},
        # Not the tower of the checkpoints, which has 300 million weights: 128 x 128 pixels make 4 x 4 tokens.
        # Its own activations write over what gradients need.
        vision_config={
            "architecture": "resnet10t",
            "model_args": {"act_layer": "gelu"},
            "hidden_size": 512,
            "vocab_size": 4,
            "vocab_offset": 56,
        },
        audio_config={**ears, "sscp_conv_channel_size": (8, 4), "vocab_size": 4, "vocab_offset": 60},
        vision_soft_tokens_per_image=16,
        image_token_id=4,
        boi_token_id=5,
        eoi_token_id=6,
        audio_token_id=7,
        boa_token_id=8,
        eoa_token_id=9,
        tie_word_embeddings=False,
        attn_implementation={
            "": attention,
            "vision_config": "eager",
            "audio_config": "eager",
            "text_config": attention,
        },
    )
    return transformers.Gemma3nForConditionalGeneration(config)


def _gemma3n_processor() -> Any:
    return transformers.Gemma3nProcessor(
        feature_extractor=transformers.Gemma3nAudioFeatureExtractor(),
        image_processor=transformers.SiglipImageProcessor(size={"height": 128, "width": 128}),
        tokenizer=tokenizer([*SPECIALS[:4], *GEMMA_TOKENS.values()], extra_special_tokens=GEMMA_TOKENS),
        image_seq_length=16,
    )


LFM3_VL = TinyFamily(
    "lfm3_vl",
    _lfm3,
    _lfm3_processor,
    "<|vision_start|><|image_pad|><|vision_end|>",
    (32, 24),
    (24, 40),
    False,
    (12, 15),
    projects=False,
    windowed=True,
    video="<|video_pad|>",
    unable=STATES,
    clip_tokens=24,
    shows_patches=False,
)
# 96 x 64: six crops of 4 tokens and the whole picture of 16; 64 x 64: the whole picture.
STEP3P7 = TinyFamily(
    "step3p7",
    _step,
    _step_processor,
    "<im_patch>",
    (96, 64),
    (64, 64),
    False,
    (40, 16),
    projects=False,
    windowed=True,
    shows_patches=False,
)
# Its tokens are those of the grid, one more in every row, one in front and one behind.
HUNYUAN_VL = TinyFamily(
    "hunyuan_vl",
    _hunyuan,
    _hunyuan_processor,
    "<image_start><image><image_end>",
    (32, 24),
    (24, 40),
    False,
    (17, 22),
    axes=4,
    projects=False,
    new_image_in_turn=False,
    # The last axis counts the images of all rows, and there is none for text.
    unable=("rows", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "packing"),
)
FAST_VLM = TinyFamily(
    "fast_vlm",
    _fast_vlm,
    _fast_vlm_processor,
    "<image>",
    (128, 128),
    (160, 100),
    False,
    (16, 16),
    projects=False,
    shows_patches=False,
)
# 128 x 64: the whole picture of 18 tokens and two slices of 16; 64 x 64: the whole picture. Frames are not sliced.
MINICPMV4_6 = TinyFamily(
    "minicpmv4_6",
    _minicpm,
    _minicpm_processor,
    "<|image_pad|>",
    (128, 64),
    (64, 64),
    False,
    (50, 16),
    projects=False,
    video="<|video_pad|>",
    unable=(*STATES, "guesses"),
    frames=3,
    clip_tokens=54,
)
# 128 x 64: two tiles and a thumbnail of 16 tokens each; 64 x 64: one tile.
GRANITE_DOCLING = TinyFamily(
    "granite_docling",
    _docling,
    _docling_processor,
    "<image>",
    (128, 64),
    (64, 64),
    False,
    (48, 16),
    projects=False,
    tower=BOTH,
    decoder="text_model",
    unable=("merged embeddings", "words behind embeddings"),
    drop_depth=0.75,  # the first three layers add features of the tower
)
# Its inner states stand three deep, and words go into each layer once more.
GEMMA3N = replace(
    FAST_VLM,
    name="gemma3n",
    build=_gemma3n,
    processor=_gemma3n_processor,
    windowed=True,
    shares_keys=True,
    drop_depth=1 / 3,
    unable=("merged embeddings", "plain hidden states", "checkpointing"),
    changes_last=True,
)
ROWS = [LFM3_VL, STEP3P7, HUNYUAN_VL, FAST_VLM, MINICPMV4_6, GRANITE_DOCLING, GEMMA3N]
