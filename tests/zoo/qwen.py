"""Tiny models of the Qwen-VL line and of what has a tower like theirs: patches merged two by two, pictures of any size.

A visual token stands for 8 x 8 pixels. All processors are transformers' own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from tiny import IDS, QWEN_PATCHES, QWEN_SPECIALS, SPECIALS, STATES, TEXT, TOWER, WINDOW, TinyFamily, tokenizer
from torch import nn

MARKS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}
PATCHES = {"patch_size": 4, "merge_size": 2}
SIZE = {"shortest_edge": 64, "longest_edge": 4096}  # pixels of a picture, or of all frames of a video
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16}
IMAGE, VIDEO = ("<|vision_start|>" + pad + "<|vision_end|>" for pad in ("<|image_pad|>", "<|video_pad|>"))


def _tower(**extra: Any) -> dict[str, Any]:
    """A tower as Qwen2.5-VL and Qwen3-VL write it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "out_hidden_size": 64}
    return {**sizes, "spatial_merge_size": 2, **QWEN_PATCHES, **extra}


def _windows() -> dict[str, Any]:
    """Windows of 2 x 2 visual tokens in the first two layers of a tower, the whole picture in the last one."""
    return _tower(window_size=16, fullatt_block_indexes=[2])


def _qwen2_vl(attention: str) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "depth": 3, "num_heads": 2, "spatial_merge_size": 2}
    config = Qwen2VLConfig(
        vision_config={**tower, **QWEN_PATCHES},
        text_config={**TEXT, "rope_parameters": AXES},
        attn_implementation=attention,
        **MARKS,
        **IDS,
    )
    return Qwen2VLForConditionalGeneration(config)


def _qwen3(attention: str, name: str, tower: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    """A model of Qwen3-VL or a later one: its axes take turns in the frequencies."""
    import transformers

    rope = {**AXES, "mrope_interleaved": True}
    config = getattr(transformers, f"{name}Config")(
        vision_config=_tower(num_position_embeddings=64, **tower),
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **text},
        attn_implementation=attention,
        **MARKS,
        **IDS,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _exaone4_5(attention: str) -> nn.Module:
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    config = Exaone4_5_Config(
        vision_config={**_windows(), "num_key_value_heads": 1},
        # Three of four layers have windows.
        text_config={**TEXT, "model_type": "exaone4", "sliding_window": WINDOW, "sliding_window_pattern": 4},
        image_token_id=4,
        video_token_id=5,
        attn_implementation=attention,
        **IDS,
    )
    return Exaone4_5_ForConditionalGeneration(config)


def _hyperclovax(attention: str) -> nn.Module:
    from transformers import HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration

    scales = {"embedding_multiplier": 1.2, "residual_multiplier": 0.9, "logits_scaling": 0.8}
    config = HyperCLOVAXVisionV2Config(
        vision_config={**_windows(), "model_type": "qwen2_5_vl_vision"},
        text_config={**TEXT, "model_type": "hyperclovax", **scales},
        image_token_id=4,
        video_token_id=5,
        tie_word_embeddings=False,
        attn_implementation=attention,
        **IDS,
    )
    return HyperCLOVAXVisionV2ForConditionalGeneration(config)


def _video_llama_3(attention: str) -> nn.Module:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    config = VideoLlama3Config(
        vision_config={**TOWER, "patch_size": 8},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=4,
        video_token_id=5,
        attn_implementation=attention,
        **IDS,
    )
    return VideoLlama3ForConditionalGeneration(config)


def _paddleocr_vl(attention: str) -> nn.Module:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2},
        text_config={**TEXT, "head_dim": 16, "rope_parameters": AXES, "tie_word_embeddings": False},
        tie_word_embeddings=False,
        attn_implementation=attention,
        **MARKS,
        **IDS,
    )
    return PaddleOCRVLForConditionalGeneration(config)


def _minimax_m3_vl(attention: str, **text: Any) -> nn.Module:
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
    experts |= {"dense_intermediate_size": 96, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
    config = MiniMaxM3VLConfig(
        vision_config={**TOWER, "num_attention_heads": 1, "image_size": 32, "spatial_merge_size": 2, **QWEN_PATCHES},
        text_config={**TEXT, "head_dim": 16, "rotary_dim": 8, **experts, **text},
        image_token_index=4,
        video_token_index=5,
        projector_hidden_size=48,
        attn_implementation=attention,
        **IDS,
    )
    return MiniMaxM3SparseForConditionalGeneration(config)


def _kimi_k25(attention: str) -> nn.Module:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    experts |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1}
    # Keys are wider than values.
    latent = {"kv_lora_rank": 24, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    grid = {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 2}
    config = Kimi_K25Config(
        vision_config={**TOWER, "patch_size": 4, **grid},
        text_config={**TEXT, "num_key_value_heads": 4, "model_type": "deepseek_v3", **experts, **latent},
        projection_hidden_size=32,
        tie_word_embeddings=False,
        attn_implementation=attention,
        **MARKS,
        **IDS,
    )
    return Kimi_K25ForConditionalGeneration(config)


def _processor(name: str, specials: list[str] = QWEN_SPECIALS) -> Any:
    """A processor with the pictures of Qwen2-VL, and the videos of Qwen3-VL or Qwen2-VL."""
    import transformers

    video = transformers.Qwen3VLVideoProcessor if name == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=SIZE, temporal_patch_size=2, **PATCHES),
        tokenizer=tokenizer(specials),
        video_processor=video(size=SIZE, temporal_patch_size=2, do_sample_frames=False, **PATCHES),
    )


def _video_llama_3_processor(**video: Any) -> Any:
    from transformers import VideoLlama3ImageProcessor, VideoLlama3Processor, VideoLlama3VideoProcessor

    return VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(size=SIZE, patch_size=8, merge_size=1),
        tokenizer=tokenizer(QWEN_SPECIALS),
        video_processor=VideoLlama3VideoProcessor(size=SIZE, patch_size=8, merge_size=2, **video),
    )


def _paddleocr_vl_processor() -> Any:
    from transformers import PaddleOCRVLImageProcessor, PaddleOCRVLProcessor

    return PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessor(size=SIZE, **PATCHES),
        tokenizer=tokenizer(QWEN_SPECIALS, extra_special_tokens={"image_token": "<|image_pad|>"}),
    )


MINIMAX_SPECIALS = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
MINIMAX_TIMES = ["]<]0.0 seconds[>[", "]<]0.1 seconds[>["]  # of frames 0 and 2


def _minimax_m3_vl_processor() -> Any:
    from transformers import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

    patches = {**PATCHES, "temporal_patch_size": 2}
    return MiniMaxM3VLProcessor(
        image_processor=MiniMaxM3VLImageProcessor(size=SIZE, **patches),
        tokenizer=tokenizer([*SPECIALS[:4], *MINIMAX_SPECIALS, *MINIMAX_TIMES]),
        # Of a video's four frames two become one: each of the two is encoded by itself.
        video_processor=MiniMaxM3VLVideoProcessor(**patches, min_pixels=64, vision_segment_max_frames=1),
    )


KIMI_SPECIALS = ["<|media_pad|>", "<|kimi_k25_video_placeholder|>"]
KIMI_SPECIALS += ["<|media_begin|>", "<|media_end|>", "<|media_content|>"]
KIMI_TIMES = ["00:00:00.000", "00:00:00.083"]  # of frames 0 and 2


def _kimi_k25_processor() -> Any:
    from transformers import Kimi_K25ImageProcessor, Kimi_K25Processor, Kimi_K25VideoProcessor

    return Kimi_K25Processor(
        image_processor=Kimi_K25ImageProcessor(**PATCHES),
        tokenizer=tokenizer([*SPECIALS[:4], *KIMI_SPECIALS, *KIMI_TIMES]),
        video_processor=Kimi_K25VideoProcessor(temporal_patch_size=2, do_sample_frames=False, **PATCHES),
    )


_kind = functools.partial(
    TinyFamily,
    image=IMAGE,
    size=(32, 24),
    other_size=(24, 40),
    has_cls=False,
    tokens=(12, 15),
    video=VIDEO,
    frames=4,
    clip_tokens=24,
    projects=False,
)
_axes = functools.partial(_kind, axes=3, new_image_in_turn=False)
_later = functools.partial(_axes, processor=functools.partial(_processor, "Qwen3VL"))
_DEEP = {"deepstack_visual_indexes": [0, 1]}

QWEN2_VL = _axes(name="qwen2_vl", build=_qwen2_vl, processor=functools.partial(_processor, "Qwen2VL"))
# Features that enter between layers don't come with embeddings.
_deep = functools.partial(_later, unable=("merged embeddings",))
QWEN3_VL = _deep(name="qwen3_vl", build=functools.partial(_qwen3, name="Qwen3VL", tower=_DEEP, text={}))
QWEN3_VL_MOE = _deep(name="qwen3_vl_moe", build=functools.partial(_qwen3, name="Qwen3VLMoe", tower=_DEEP, text=EXPERTS))
QWEN3_5 = _later(
    name="qwen3_5", build=functools.partial(_qwen3, name="Qwen3_5", tower={}, text=LINEAR), unable=(*STATES, "guesses")
)
QWEN3_5_MOE = _later(
    name="qwen3_5_moe",
    unable=(*STATES, "guesses"),
    build=functools.partial(
        _qwen3, name="Qwen3_5Moe", tower={}, text={**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}
    ),
)
COSMOS3_OMNI = _deep(
    name="cosmos3_omni",
    build=functools.partial(
        _qwen3,
        name="Cosmos3Omni",
        tower={"model_type": "qwen3_vl_vision", **_DEEP},
        text={"model_type": "qwen3_vl_text"},
    ),
)
EXAONE4_5 = _kind(
    name="exaone4_5",
    build=_exaone4_5,
    processor=functools.partial(_processor, "Exaone4_5_"),
    windowed=True,
    unable=("words behind embeddings",),
)
HYPERCLOVAX = _kind(
    # Positions count the padding in between.
    unable=("padding between turns", "words behind embeddings"),
    name="hyperclovax_vision_v2",
    build=_hyperclovax,
    processor=functools.partial(_processor, "HyperCLOVAXVisionV2"),
)
# A visual token stands for 8 x 8 pixels of an image and for 16 x 16 of one frame of a video, which are of 32 x 32.
VIDEO_LLAMA_3 = _kind(
    name="video_llama_3",
    build=_video_llama_3,
    processor=_video_llama_3_processor,
    video="<|video_pad|>",
    clip_tokens=16,
)
PADDLEOCR_VL = _axes(
    name="paddleocr_vl", build=_paddleocr_vl, processor=_paddleocr_vl_processor, video="", clip_tokens=0
)
MINIMAX_M3_VL = _kind(
    name="minimax_m3_vl",
    build=_minimax_m3_vl,
    processor=_minimax_m3_vl_processor,
    image="]<]image[>[",
    video="]<]video[>[",
)
# Queries pick 24 blocks of four keys: all that these prompts have. Which blocks it would pick of more depends on
# padding also where nothing is pruned.
BLOCKS = {"layer_types": ["full_attention", *["minimax_m3_sparse"] * 3], "index_n_heads": 2, "index_head_dim": 8}
BLOCKS |= {"index_block_size": 4, "index_topk_blocks": 24}
MINIMAX_M3_VL_SPARSE = replace(
    MINIMAX_M3_VL,
    build=functools.partial(_minimax_m3_vl, **BLOCKS),
    variant="sparse",
    drop_depth=0.25,  # the layers behind leave keys out by an indexer, so that their attention isn't read
    unable=("packing",),
)
# Frames of a video are pooled two by two.
KIMI_K25 = _kind(
    name="kimi_k25",
    build=_kimi_k25,
    processor=_kimi_k25_processor,
    image="<|media_begin|><|media_content|><|media_pad|><|media_end|>",
    video="<|kimi_k25_video_placeholder|>",
)
ROWS = [QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE, COSMOS3_OMNI, EXAONE4_5, HYPERCLOVAX]
ROWS += [VIDEO_LLAMA_3, PADDLEOCR_VL, MINIMAX_M3_VL, MINIMAX_M3_VL_SPARSE, KIMI_K25]
