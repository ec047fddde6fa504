"""Tiny models of families that cut pictures into tiles, and of kin of LLaVA, all with their real processors."""

from __future__ import annotations

import functools
from typing import Any

from tiny import BOTH, INTERNVL, LLAVA_ONEVISION, SPECIALS, STATES, TEXT, TOWER, WINDOW, TinyFamily, tokenizer
from torch import nn

VIDEO_SPECIALS = [*SPECIALS, "<video>"]
CLIP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SQUARE = {"height": 56, "width": 56}
CROPS = [[56, 112], [112, 56], [112, 112]]  # (height, width): two or four crops of 56 x 56, 16 patches each


def _clip_and_llama(**vision: Any) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(**{**TOWER, "image_size": 56, "patch_size": 14, **vision})
    return {"vision_config": vision, "text_config": LlamaConfig(**TEXT)}


def _llava_next_video(attention: str) -> nn.Module:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        **_clip_and_llama(),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=CROPS,
        attn_implementation=attention,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _llava_next_video_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**CLIP),
        image_processor=LlavaNextImageProcessor(**CLIP, image_grid_pinpoints=CROPS),
        tokenizer=tokenizer(VIDEO_SPECIALS),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _video_llava(attention: str) -> nn.Module:
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        **_clip_and_llama(), image_token_index=4, video_token_index=5, attn_implementation=attention
    )
    return VideoLlavaForConditionalGeneration(config)


def _video_llava_processor() -> Any:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**CLIP),
        video_processor=VideoLlavaVideoProcessor(**CLIP),
        tokenizer=tokenizer(VIDEO_SPECIALS),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _vipllava(attention: str) -> nn.Module:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(
        **_clip_and_llama(),
        image_token_index=4,
        vision_feature_layers=[-2, -3, 1],  # in newer versions of transformers the singular is the name, too
        image_seq_length=16,
        attn_implementation=attention,
    )
    return VipLlavaForConditionalGeneration(config)


def _vipllava_processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**CLIP),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


AYA_SPECIALS = [*SPECIALS[:4], "<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"]
AYA_SPECIALS += [f"TILE_{number}" for number in range(1, 5)]


def _siglip_and_cohere2(patch_size: int) -> dict[str, Any]:
    from transformers import Cohere2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(**TOWER, image_size=56, patch_size=patch_size, vision_use_head=False)
    # Three layers with a window, then one without, as real ones have.
    return {"vision_config": vision, "text_config": Cohere2Config(**TEXT, sliding_window=WINDOW)}


def _aya_vision(attention: str) -> nn.Module:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(**_siglip_and_cohere2(7), image_token_index=4, attn_implementation=attention)
    return AyaVisionForConditionalGeneration(config)


def _aya_vision_processor() -> Any:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

    return AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer=tokenizer(AYA_SPECIALS),
        patch_size=7,
        img_size=56,
        downsample_factor=2,
    )


COHERE_SPECIALS = [*SPECIALS[:4], "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"]


def _cohere2_vision(attention: str) -> nn.Module:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        **_siglip_and_cohere2(7), image_token_id=4, alignment_intermediate_size=96, attn_implementation=attention
    )
    return Cohere2VisionForConditionalGeneration(config)


def _cohere2_vision_processor() -> Any:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    names = ["image_token", "boi_token", "eoi_token", "img_line_break_token"]
    return Cohere2VisionProcessor(
        # This patch_size is the side of a tile in visual tokens.
        image_processor=Cohere2VisionImageProcessor(size=SQUARE, max_patches=4, patch_size=4),
        tokenizer=tokenizer(COHERE_SPECIALS, extra_special_tokens=dict(zip(names, COHERE_SPECIALS[4:], strict=True))),
    )


OVIS_INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
OVIS_SPECIALS = [*SPECIALS[:4], "<IMG_ATOM>", *OVIS_INDICATORS, "<image>"]


def _ovis2(attention: str) -> nn.Module:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2VisionConfig, Qwen2Config

    config = Ovis2Config(
        # A visual vocabulary of 32 words, the last five of which stand for the indicators.
        vision_config=Ovis2VisionConfig(**TOWER, image_size=56, patch_size=7, hidden_stride=2, vocab_size=32),
        text_config=Qwen2Config(**TEXT),
        image_token_id=4,
        visual_indicator_token_ids=[5, 6, 7, 8, 9],
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
        attn_implementation=attention,
    )
    return Ovis2ForConditionalGeneration(config)


def _ovis2_processor() -> Any:
    from transformers import Ovis2ImageProcessor, Ovis2Processor

    return Ovis2Processor(
        image_processor=Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer(OVIS_SPECIALS),
        image_seq_length=16,
    )


def _perception_lm(attention: str) -> nn.Module:
    from transformers import LlamaConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration, TimmWrapperConfig

    tower = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 56, "patch_size": 7, "ref_feat_shape": (8, 8)}
    config = PerceptionLMConfig(
        vision_config=TimmWrapperConfig(
            architecture="vit_pe_lang_large_patch14_448", do_pooling=False, model_args={**tower, "global_pool": ""}
        ),
        text_config=LlamaConfig(**TEXT),
        projector_pooling_ratio=2,
        image_token_id=4,
        video_token_id=5,
        attn_implementation=attention,
    )
    return PerceptionLMForConditionalGeneration(config)


def _perception_lm_processor() -> Any:
    from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

    return PerceptionLMProcessor(
        video_processor=PerceptionLMVideoProcessor(size=SQUARE),
        image_processor=PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4),
        tokenizer=tokenizer(VIDEO_SPECIALS, extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}),
        patch_size=7,
        pooling_ratio=2,
    )


LFM_SPECIALS = [*SPECIALS, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
LFM_SPECIALS += [f"<|img_row_{row}_col_{column}|>" for row in range(1, 3) for column in range(1, 3)]


def _lfm2_vl(attention: str) -> nn.Module:
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

    kinds = ["conv", "conv", "full_attention", "conv"]
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**TOWER, num_patches=16, patch_size=4, vision_use_head=False),
        text_config=Lfm2Config(**TEXT, layer_types=kinds, block_auto_adjust_ff_dim=False),
        image_token_id=4,
        projector_hidden_size=96,
        attn_implementation=attention,
    )
    return Lfm2VlForConditionalGeneration(config)


def _lfm2_vl_processor() -> Any:
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    sizes = {"encoder_patch_size": 4, "tile_size": 16, "min_image_tokens": 4, "max_image_tokens": 8, "max_tiles": 4}
    return Lfm2VlProcessor(image_processor=Lfm2VlImageProcessor(**sizes), tokenizer=tokenizer(LFM_SPECIALS))


QIANFAN_SPECIALS = [*SPECIALS[:4], "<IMG_CONTEXT>", "<img>", "</img>", "<image>"]


def _qianfan_ocr(attention: str) -> nn.Module:
    from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration, QianfanOCRVisionConfig, Qwen3Config

    config = QianfanOCRConfig(
        vision_config=QianfanOCRVisionConfig(**TOWER, image_size=56, patch_size=7),
        text_config=Qwen3Config(**TEXT, head_dim=16),
        image_token_id=4,
        image_seq_length=16,
        attn_implementation=attention,
    )
    return QianfanOCRForConditionalGeneration(config)


def _qianfan_ocr_processor() -> Any:
    from transformers import GotOcr2ImageProcessor, QianfanOCRProcessor

    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return QianfanOCRProcessor(
        image_processor=GotOcr2ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer=tokenizer(QIANFAN_SPECIALS, extra_special_tokens=special),
        image_seq_length=16,
    )


EMBEDDINGS = ("merged embeddings", "words behind embeddings")
_row = functools.partial(TinyFamily, has_cls=False, projects=False)
# 112 x 56: two tiles and a thumbnail of 16 tokens each. 112 x 100: four tiles and one. 56 x 56: a single tile.
_tiled = functools.partial(_row, size=(112, 56), other_size=(56, 56), tokens=(48, 16))

ROWS = [
    # 112 x 100: a thumbnail, four crops of which two rows are cut off, and a newline in every row. 56 x 112: two crops.
    _row(
        "llava_next_video",
        _llava_next_video,
        _llava_next_video_processor,
        "<image>",
        (112, 100),
        (56, 112),
        tokens=(88, 56),
        resizes=False,
        projects=True,
        tower=BOTH,
        has_cls=True,
        video="<video>",
        clip_tokens=16,
    ),
    # The frames of a video keep the token of their [CLS].
    _row(
        "video_llava",
        _video_llava,
        _video_llava_processor,
        "<image>",
        (56, 56),
        (80, 50),
        tokens=(16, 16),
        has_cls=True,
        tower=BOTH,
        video="<video>",
        clip_tokens=68,
    ),
    _row(
        "vipllava",
        _vipllava,
        _vipllava_processor,
        "<image>",
        (56, 56),
        (80, 50),
        tokens=(16, 16),
        has_cls=True,
        projects=True,
        tower=BOTH,
    ),
    _tiled("aya_vision", _aya_vision, _aya_vision_processor, "<image>", windowed=True, tower=BOTH),
    _tiled("cohere2_vision", _cohere2_vision, _cohere2_vision_processor, "<|IMG_PATCH|>", windowed=True, tower=BOTH),
    # Its words around tiles are made by the vision tower.
    _row(
        "ovis2",
        _ovis2,
        _ovis2_processor,
        "<image>",
        (112, 100),
        (56, 56),
        tokens=(80, 16),
        unable=EMBEDDINGS,
        tower=BOTH,
    ),
    # Images of one call have the same number of tiles.
    _row(
        "perception_lm",
        _perception_lm,
        _perception_lm_processor,
        "<image>",
        (112, 56),
        (56, 112),
        tokens=(48, 48),
        tower=("tap",),
        has_cls=True,
        video="<video>",
        clip_tokens=64,
    ),
    # 48 x 32: four tiles of four tokens and a thumbnail of six. 32 x 24: a single tile of six.
    _row(
        "lfm2_vl",
        _lfm2_vl,
        _lfm2_vl_processor,
        "<image>",
        (48, 32),
        (32, 24),
        tokens=(22, 6),
        unable=STATES,
        nested=True,
        tower=("tap",),
    ),
    _tiled("qianfan_ocr", _qianfan_ocr, _qianfan_ocr_processor, "<image>", has_cls=True, tower=BOTH),
    INTERNVL,
    LLAVA_ONEVISION,
]
