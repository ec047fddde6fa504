"""Tiny, randomly initialised models of the real classes with their real processors, all made offline from configs.

Every class is the one of transformers; only sizes, weights and vocabulary are made up: four decoder layers with
grouped-query heads, a word-level tokenizer of forty words, and pictures of noise. Nothing here can read or see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, **IDS}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


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


def clip(seed: int, size: tuple[int, int] = (56, 56), frames: int = 4) -> torch.Tensor:
    """A colourful noise video, (frames, height, width, 3), uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size[1], size[0], 3), generator=generator, dtype=torch.uint8)


def sharpen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights large enough that attention is peaked and each token matters; flat weights hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "lambda" in name or parameter.dim() < 2:
                is_scale = name.endswith("weight") or "lambda" in name
                parameter.copy_(1 + 0.1 * noise if is_scale else 0.1 * noise)
            else:
                is_table = id(parameter) in tables or parameter.shape[0] == 1  # embeddings, also of positions
                parameter.copy_(noise * 1.5 / (1 if is_table else parameter[0].numel() ** 0.5))
    return model.eval()


def marks(model: nn.Module) -> dict[str, int]:
    """The ids that stand for visual tokens in prompts, by what they stand for."""
    names = [(kind, f"{kind}_token_{word}") for kind in ("image", "video") for word in ("index", "id")]
    found = {kind: getattr(model.config, name) for kind, name in names if hasattr(model.config, name)}
    return {kind: mark for kind, mark in found.items() if mark is not None}


@dataclass(frozen=True)
class TinyFamily:
    """One row of the family axis of the test matrix.

    Attributes:
        name: The family's name in vltok.
        build: Makes a model, given the attention implementation.
        processor: Makes the processor.
        image: What a prompt writes for an image.
        size: Size of a picture, (width, height).
        other_size: A second size; where the family lets the size decide, its pictures have another number of tokens.
        has_cls: Whether the vision tower has a [CLS] token.
        tokens: Visual tokens of a picture of `size` and of one of `other_size`.
        variant: What tells it from the other rows of its family, "" for the plain one.
        axes: How many rotary positions a token has.
        shows_patches: Whether vltok knows which patches a visual token stands for, and so ranks them by attention.
        projects: Whether its projector can be replaced.
        tower: Which methods that bring weights can change its vision tower, by their names in the matrix.
        continued: Whether its projector is two linear layers with a GELU between, which a new one may continue.
        packer_scale: A scale factor of TokenPacker that divides its patch grid.
        new_image_in_turn: Whether the unpruned generate() takes an image on top of a filled cache.
        windowed: Whether some decoder layers see fewer tokens than the prompts have.
        tower_shows_maps: Whether a call that asks for attention maps asks its vision tower for them, too.
        video: What a prompt writes for a video, "" if the family takes none.
        frames: Frames of a video, which are of `size`.
        clip_tokens: Visual tokens of such a video.
        mixes: Whether a prompt may have images and videos.
        decoder: The attribute of the model that holds its decoder.
        real: Whether the processor is transformers' own.
        nested: Whether the processor takes a list of images for each prompt.
        shares_keys: Whether the last decoder layers attend to the keys that earlier ones made.
        word_type: What `token_type_ids` says of a word that the model wrote.
        feeds_layers: Whether its decoder makes further inputs of the layers from the embeddings.
        changes_last: Whether more is done to the last hidden state before it is returned as the decoder's output.
        drop_depth: After which share of its decoder layers tests drop tokens.
        needs_images: Whether the processor refuses prompts of text alone.
        resizes: Whether smaller images have fewer tokens in proportion, if not all have as many.
        unable: Promises that the unpruned model breaks, in the words of tests/contract/.
    """

    name: str
    build: Callable[..., nn.Module]
    processor: Callable[[], Any]
    image: str
    size: tuple[int, int]
    other_size: tuple[int, int]
    has_cls: bool
    tokens: tuple[int, int]
    variant: str = ""
    axes: int = 1
    shows_patches: bool = True
    projects: bool = True
    continued: bool = True
    tower: tuple[str, ...] = ()
    packer_scale: int = 2
    new_image_in_turn: bool = True
    windowed: bool = False
    tower_shows_maps: bool = False
    video: str = ""
    frames: int = 4
    clip_tokens: int = 0
    mixes: bool = True
    decoder: str = "language_model"
    real: bool = True
    nested: bool = False
    shares_keys: bool = False
    word_type: int = 0
    feeds_layers: bool = False
    changes_last: bool = False
    drop_depth: float = 0.5
    needs_images: bool = False
    resizes: bool = True
    unable: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The row's name in the tests."""
        return "-".join(filter(None, [self.name, self.variant, "cls" if self.has_cls else "no-cls"]))

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A model with sharp weights, in eval mode, that never generates padding or placeholders.

        The global random generator stays as it is: a test may have seeded it before it asks for its model.
        """
        with torch.random.fork_rng(devices=[]):
            model = sharpen(self.build(attention), seed).to(dtype)
        # Trained models don't write placeholders; a random one would, and transformers would look for the image.
        indicators = getattr(model.config, "visual_indicator_token_ids", ())
        model.generation_config.suppress_tokens = sorted({0, 1, 3, *marks(model).values(), *indicators})
        return model

    def inputs(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] = (),
        padding_side: str = "left",
        processor: Any = None,
        videos: Sequence[torch.Tensor] = (),
    ) -> Any:
        """Process prompts in which "<image>" stands for an image of `images`, "<video>" for a video of `videos`."""
        processor = processor or self.processor()
        if self.needs_images and not len(images) and not len(videos):
            whole = self.inputs(["<image>", *prompts], [picture(0, self.size)], padding_side, processor)
            shape, real = whole["input_ids"].shape, whole["attention_mask"][1:].any(0)
            return {name: value[1:, real] for name, value in whole.items() if value.shape == shape}
        text = [prompt.replace("<image>", "\0").replace("<video>", self.video) for prompt in prompts]
        pictures = list(images)
        if self.nested:
            rest = iter(images)
            pictures = [list(islice(rest, prompt.count("<image>"))) for prompt in prompts]
        given = {"images": pictures if images else None} | ({"videos": list(videos)} if len(videos) else {})
        inputs = processor(
            text=[each.replace("\0", self.image) for each in text],
            **given,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        inputs.pop("labels", None)  # some write them for prompts without an answer, too: nothing to learn
        return inputs


def _llava(attention: str, tower: str = "clip", text: Callable[[], Any] | None = None) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
            **TOWER, image_size=56, patch_size=14
        ),
        text_config=text() if text else LlamaConfig(**TEXT),
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


PINPOINTS = [[42, 84], [84, 42], [84, 84]]  # (height, width): two or four crops of 42 x 42, nine patches each


def _llava_next(attention: str) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=42, patch_size=14),
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        attn_implementation=attention,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_next_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


ONEVISION_SPECIALS = [*SPECIALS, "<video>"]


def _llava_onevision(attention: str) -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=56, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 168]],
        vision_aspect_ratio="anyres_max_4",  # 168 x 168 is nine crops: more than four are shrunk
        attn_implementation=attention,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_processor() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": 56, "width": 56}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 168]]
        ),
        tokenizer=tokenizer(ONEVISION_SPECIALS),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )


QWEN_SPECIALS = [*SPECIALS[:4], "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_PATCHES = {"patch_size": 4, "temporal_patch_size": 2}


def _qwen2_5_vl(attention: str, **text: Any) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "out_hidden_size": 64}
    # Windows of 2 x 2 visual tokens in the first two layers, the whole picture in the last one.
    windows = {"spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [2]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={**tower, **windows, **QWEN_PATCHES},
        text_config={**TEXT, "rope_parameters": rope, **text},
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        attn_implementation=attention,
        **IDS,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_5_vl_processor() -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 64, "longest_edge": 4096}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, merge_size=2, **QWEN_PATCHES),
        tokenizer=tokenizer(QWEN_SPECIALS),
        video_processor=Qwen2VLVideoProcessor(size=size, merge_size=2, do_sample_frames=False, **QWEN_PATCHES),
    )


INTERNVL_SPECIALS = [*SPECIALS[:4], "<IMG_CONTEXT>", "<img>", "</img>", "<video>"]


def _internvl(attention: str, text: Callable[[], Any] | None = None) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **TOWER, image_size=56, patch_size=7, use_qk_norm=True, norm_type="rms_norm"
        ),
        text_config=text() if text else Qwen2Config(**TEXT),
        image_token_id=4,
        image_seq_length=16,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return InternVLForConditionalGeneration(config)


def _internvl_processor() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 56, "width": 56}
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=tokenizer(INTERNVL_SPECIALS, extra_special_tokens={**special, "video_token": "<video>"}),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )


# What no layer that holds a state can do.
STATES = ("crop", "crop into the prompt", "batch_select_indices", "batch_repeat_interleave")
STATES += ("padding between turns", "packing")
WINDOW = 8  # tokens, where prompts have 20 or more
# Of four decoder layers every second one sees the whole prompt.
MIXED = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**TEXT, sliding_window=WINDOW)


def _mixed_qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**TEXT, **MIXED)


def _chunked_llama4() -> Any:
    from transformers import Llama4TextConfig

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 16}
    chunks = {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 0, 1], "attn_temperature_tuning": False}
    return Llama4TextConfig(**TEXT, **experts, **chunks)


BOTH = ("soft", "tap")
LLAVA = TinyFamily(
    "llava",
    _llava,
    _llava_processor,
    "<image>",
    (56, 56),
    (80, 50),
    True,
    (16, 16),
    tower_shows_maps=True,
    tower=(*BOTH, "tome"),
)
LLAVA_SIGLIP = replace(
    LLAVA,
    build=functools.partial(_llava, tower="siglip"),
    processor=functools.partial(_llava_processor, "siglip"),
    has_cls=False,
)
# 84 x 50: a thumbnail, four crops of which a strip above and below is cut off, and four newlines. 42 x 84: two crops.
LLAVA_NEXT = TinyFamily(
    "llava_next",
    _llava_next,
    _llava_next_processor,
    "<image>",
    (84, 50),
    (42, 84),
    True,
    (37, 33),
    packer_scale=3,
    tower=BOTH,
    resizes=False,
)
# 112 x 100: a thumbnail, four crops of which two rows are cut off, and a newline in every row; 168 x 150 is shrunk.
# A video: four tokens of each frame, and a newline.
LLAVA_ONEVISION = TinyFamily(
    "llava_onevision",
    _llava_onevision,
    _llava_onevision_processor,
    "<image>",
    (112, 100),
    (168, 150),
    False,
    (88, 79),
    tower=BOTH,
    video="<video>",
    clip_tokens=17,
    resizes=False,
)
QWEN2_5_VL = TinyFamily(
    "qwen2_5_vl",
    _qwen2_5_vl,
    _qwen2_5_vl_processor,
    "<|vision_start|><|image_pad|><|vision_end|>",
    (32, 24),
    (24, 40),
    False,
    (12, 15),
    axes=3,
    projects=False,
    new_image_in_turn=False,
    video="<|vision_start|><|video_pad|><|vision_end|>",
    clip_tokens=24,
)
# 112 x 56: two tiles and a thumbnail of 16 tokens each. 56 x 56: a single tile. Each frame of a video is an image.
INTERNVL = TinyFamily(
    "internvl",
    _internvl,
    _internvl_processor,
    "<IMG_CONTEXT>",
    (112, 56),
    (56, 56),
    True,
    (48, 16),
    continued=False,
    packer_scale=4,
    tower=("tap",),  # its attention norms queries and keys
    video="<video>",
    clip_tokens=64,
)
LLAVA_SLIDING = replace(LLAVA, build=functools.partial(_llava, text=_mistral), variant="sliding", windowed=True)
LLAVA_CHUNKED = replace(LLAVA, build=functools.partial(_llava, text=_chunked_llama4), variant="chunked", windowed=True)
INTERNVL_MIXED = replace(
    INTERNVL, build=functools.partial(_internvl, text=_mixed_qwen2), variant="mixed", windowed=True
)
QWEN2_5_VL_MIXED = replace(QWEN2_5_VL, build=functools.partial(_qwen2_5_vl, **MIXED), variant="mixed", windowed=True)
PRUNABLE = [LLAVA, LLAVA_SIGLIP, LLAVA_NEXT, QWEN2_5_VL, INTERNVL]
ALL = [*PRUNABLE, LLAVA_ONEVISION]
WINDOWED = [LLAVA_SLIDING, LLAVA_CHUNKED, INTERNVL_MIXED, QWEN2_5_VL_MIXED]  # windows that bite


@functools.lru_cache
def shared_model(family: TinyFamily, attention: str = "sdpa") -> nn.Module:
    """A model that many tests share: they may attach to it but must leave it as they found it."""
    return family.model(attention)
