"""Tiny Idefics-like, Gemma-like and Pixtral-like models: SmolVLM, Idefics2 and 3, Gemma 3 and 4, PaliGemma, and more.

All have the processors of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tiny import BOTH, IDS, SPECIALS, TEXT, TOWER, WINDOW, TinyFamily, tokenizer
from torch import nn

NEWLINES = ["\n", "\n\n"]  # tokens, as they are in the vocabularies of trained models
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]  # most layers slide and the last one doesn't


def _words(specials: Sequence[str], **extra: Any) -> tuple[Any, dict[str, int]]:
    """A tokenizer of these special tokens, and their numbers."""
    words = tokenizer([*SPECIALS[:4], *NEWLINES, *specials], extra_special_tokens=extra or None)
    return words, {word: words.convert_tokens_to_ids(word) for word in specials}


# Idefics: an image is cut into tiles of 48 x 48, with nine tokens each, and a small picture of the whole.

TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", *TILES]
IDEFICS_VOCABULARY = {**TEXT, "vocab_size": 96}
TILED = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}}


def _idefics3(attention: str, config: str, head: str) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(
        vision_config={**TOWER, "image_size": 48, "patch_size": 8},
        text_config={"model_type": "llama", **IDEFICS_VOCABULARY},
        image_token_id=6,
        scale_factor=2,
        attn_implementation=attention,
    )
    return getattr(transformers, head)(made)


def _smolvlm_processor() -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    if processing_smolvlm.num2words is None:  # an optional package, which writes the number of frames as a word
        processing_smolvlm.num2words = str
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**TILED),
        tokenizer=_words(IDEFICS)[0],
        video_processor=SmolVLMVideoProcessor(**TILED, do_sample_frames=False),
        image_seq_len=9,
    )


def _idefics3_processor() -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**TILED), tokenizer=_words(IDEFICS)[0], image_seq_len=9
    )


def _idefics2(attention: str) -> nn.Module:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    perceiver = {"resampler_n_latents": 12, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 16}
    config = Idefics2Config(
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        perceiver_config={"hidden_size": 64, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **perceiver},
        text_config={"model_type": "mistral", **IDEFICS_VOCABULARY, "sliding_window": WINDOW},
        image_token_id=6,
        attn_implementation=attention,
    )
    return Idefics2ForConditionalGeneration(config)


def _idefics2_processor(splits: bool = False) -> Any:
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    size = {"shortest_edge": 28, "longest_edge": 56}
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessor(size=size, do_image_splitting=splits),
        tokenizer=_words(IDEFICS)[0],
        image_seq_len=12,
    )


# Gemma: all images have as many tokens, or as many as fit their shape. Word embeddings are not tied to the head, else
# random models repeat the last word.

GEMMA3 = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": 64, "patch_size": 8, "vision_use_head": False}


def _gemma3(attention: str) -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    ids = _words(list(GEMMA3.values()))[1]
    layers = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "layer_types": SLIDING}
    config = Gemma3Config(
        vision_config=SIGLIP,
        text_config={**TEXT, **layers},
        mm_tokens_per_image=16,
        boi_token_index=ids["<start_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=False,
        attn_implementation=attention,
        **IDS,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3_processor(crops: bool = False) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    pan_and_scan = {"do_pan_and_scan": crops, "pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 4}
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(
            size={"height": 64, "width": 64}, pan_and_scan_min_ratio_to_activate=1.2, **pan_and_scan
        ),
        tokenizer=_words(list(GEMMA3.values()), **GEMMA3)[0],
        image_seq_length=16,
    )
    if crops:  # the processor has these, too, and its own come first
        processor.images_kwargs = processor.images_kwargs | pan_and_scan
    return processor


def _paligemma(attention: str, text: str = "gemma") -> nn.Module:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    # A cap so low as in trained models would flatten the logits of random ones.
    gemma2 = {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, "final_logit_softcapping": 300.0}
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "image_size": 32},
        text_config={"model_type": text, "head_dim": 16, **TEXT, **(gemma2 if text == "gemma2" else {})},
        image_token_index=6,
        projection_dim=64,
        hidden_size=64,
        vocab_size=64,
        tie_word_embeddings=False,
        attn_implementation="eager" if text == "gemma2" else attention,  # Gemma 2 caps its scores, which sdpa can't
        **IDS,
    )
    return PaliGemmaForConditionalGeneration(config)


def _paligemma_processor() -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(size={"height": 32, "width": 32}, image_seq_length=16)
    return PaliGemmaProcessor(image_processor=images, tokenizer=_words(["<image>"])[0])


GEMMA4 = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
GEMMA4 |= {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}
GEMMA4_SPECIALS = [*GEMMA4.values(), "<|video|>"]


def _gemma4(attention: str, **text: Any) -> nn.Module:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    ids = _words(GEMMA4_SPECIALS)[1]
    tower = {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 128}
    layers = {"head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": SLIDING}
    config = Gemma4Config(
        vision_config=tower,
        text_config={**TEXT, **layers, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64, **text},
        audio_config=None,
        boi_token_id=ids["<|image>"],
        image_token_id=ids["<|image|>"],
        eoi_token_id=ids["<image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        tie_word_embeddings=False,
        attn_implementation=attention,
        **IDS,
    )
    return Gemma4ForConditionalGeneration(config)


def _gemma4_processor() -> Any:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    fewest = {"patch_size": 4, "max_soft_tokens": 70}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**fewest),
        tokenizer=_words(GEMMA4_SPECIALS, **GEMMA4)[0],
        video_processor=Gemma4VideoProcessor(**fewest, do_sample_frames=False),
        image_seq_length=70,
    )


# Pixtral: an image has a token for every 2 x 2 patches. Mistral 3 ends each line of them by a word.

PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
PIXTRAL_TOWER = {"model_type": "pixtral", **TOWER, "head_dim": 16, "image_size": 112, "patch_size": 14}


def _mistral3(attention: str, **text: Any) -> nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        vision_config=PIXTRAL_TOWER,
        text_config={"model_type": "mistral", "head_dim": 16, "sliding_window": None, **TEXT, **text},
        image_token_index=6,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return Mistral3ForConditionalGeneration(config)


def _mistral3_processor() -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=14, size={"longest_edge": 112}),
        tokenizer=_words(list(PIXTRAL.values()))[0],
        patch_size=14,
        spatial_merge_size=2,
    )


def _lighton_ocr(attention: str) -> nn.Module:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    config = LightOnOcrConfig(
        vision_config=PIXTRAL_TOWER,
        text_config={"model_type": "qwen3", "head_dim": 16, **TEXT},
        image_token_id=6,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return LightOnOcrForConditionalGeneration(config)


def _lighton_ocr_processor() -> Any:
    from transformers import LightOnOcrProcessor, PixtralImageProcessor

    return LightOnOcrProcessor(
        image_processor=PixtralImageProcessor(patch_size=14, size={"longest_edge": 112}),
        tokenizer=_words(list(PIXTRAL.values()), **PIXTRAL)[0],
        patch_size=14,
        spatial_merge_size=2,
    )


_row = functools.partial(TinyFamily, has_cls=False, projects=False)

# 96 x 40: two tiles in a row and the whole. 64 x 56: two rows of two tiles. Frames are pictures of one tile.
SMOLVLM = _row(
    "smolvlm",
    functools.partial(_idefics3, config="SmolVLMConfig", head="SmolVLMForConditionalGeneration"),
    _smolvlm_processor,
    "<image>",
    (96, 40),
    (64, 56),
    tokens=(27, 45),
    tower=("tap",),
    video="<video>",
    clip_tokens=36,
    nested=True,
    mixes=False,  # both kinds are called pixel_values
    decoder="text_model",
)
IDEFICS3 = replace(
    SMOLVLM,
    name="idefics3",
    build=functools.partial(_idefics3, config="Idefics3Config", head="Idefics3ForConditionalGeneration"),
    processor=_idefics3_processor,
    video="",
    clip_tokens=0,
)
IDEFICS2 = _row(
    "idefics2",
    _idefics2,
    _idefics2_processor,
    "<image>",
    (56, 28),
    (40, 40),
    tokens=(12, 12),
    tower=("tap",),
    windowed=True,
    shows_patches=False,
    decoder="text_model",
)
# Four quarters and the whole.
IDEFICS2_SPLIT = replace(
    IDEFICS2, processor=functools.partial(_idefics2_processor, True), tokens=(60, 60), variant="split"
)
GEMMA3_ROW = _row(
    "gemma3",
    _gemma3,
    _gemma3_processor,
    "<start_of_image>",
    (64, 64),
    (96, 48),
    tokens=(16, 16),
    tower=BOTH,
    windowed=True,
    nested=True,
    unable=("words behind embeddings",),
)
# 96 x 48: the whole picture and two crops, each an image to the model.
GEMMA3_CROPS = replace(
    GEMMA3_ROW,
    processor=functools.partial(_gemma3_processor, True),
    variant="crops",
    tokens=(16, 48),
    unable=("packing", "words behind embeddings"),
)
PALIGEMMA = _row(
    "paligemma",
    _paligemma,
    _paligemma_processor,
    "<image>",
    (32, 32),
    (48, 32),
    tokens=(16, 16),
    tower=BOTH,
    new_image_in_turn=False,  # all of a prompt sees all of it, but not what a later turn brings
    word_type=1,
    needs_images=True,
    # The prompt's tokens have all seen each other.
    unable=("crop into the prompt", "guesses", "words behind embeddings"),
)
PALIGEMMA2 = replace(
    PALIGEMMA,
    build=functools.partial(_paligemma, text="gemma2"),
    variant="gemma2",
    windowed=True,
    unable=(*PALIGEMMA.unable, "ready-made masks"),
)
# Pictures are scaled to 70 tokens at most. 144 x 8: one row of 35, so also a frame. 40 x 20: five rows of eleven.
GEMMA4_ROW = _row(
    "gemma4",
    functools.partial(_gemma4, use_bidirectional_attention="vision", attention_k_eq_v=True),
    _gemma4_processor,
    "<|image|>",
    (144, 8),
    (40, 20),
    tokens=(35, 55),
    video="<|video|>",
    frames=3,
    clip_tokens=105,
    windowed=True,
    nested=True,
    unable=("packing", "words behind embeddings"),
)
MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
GEMMA4_MOE = replace(
    GEMMA4_ROW, build=functools.partial(_gemma4, use_bidirectional_attention="vision", **MOE), variant="moe"
)
# The small ones: an input of its own for every layer, and the last layers take keys and values of those before, so that
# tokens can leave before these only.
SHARED = {"hidden_size_per_layer_input": 8, "use_double_wide_mlp": True}
SHARED |= {"layer_types": SLIDING[2:] * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
GEMMA4_SHARED = replace(
    GEMMA4_ROW,
    build=functools.partial(_gemma4, **SHARED),
    variant="shared",
    shares_keys=True,
    drop_depth=1 / 3,
    unable=("merged embeddings", "words behind embeddings", "checkpointing"),
    feeds_layers=True,
)
# 84 x 56: two lines of three tokens. 112 x 112: four of four.
MISTRAL3 = _row(
    "mistral3", _mistral3, _mistral3_processor, "[IMG]", (84, 84), (112, 100), tokens=(9, 16), tower=("tap",)
)
MISTRAL3_SLIDING = replace(
    MISTRAL3, build=functools.partial(_mistral3, sliding_window=WINDOW), variant="sliding", windowed=True
)
LIGHTON_OCR = replace(MISTRAL3, name="lighton_ocr", build=_lighton_ocr, processor=_lighton_ocr_processor)

ROWS = [SMOLVLM, IDEFICS3, IDEFICS2, IDEFICS2_SPLIT, GEMMA3_ROW, GEMMA3_CROPS, GEMMA4_ROW, GEMMA4_MOE, GEMMA4_SHARED]
ROWS += [PALIGEMMA, PALIGEMMA2, MISTRAL3, MISTRAL3_SLIDING, LIGHTON_OCR]

# Tokens of each of the pictures that vltok takes an image or video for: its crops, or frames, are images in prompts.
APART = {(GEMMA3_CROPS.key, "image"): 16, (SMOLVLM.key, "video"): 9}
