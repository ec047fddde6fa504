"""The tiny LLaVA of canvas VQA: its configs and start values, its tokenizer and processor, how it is stored."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.utils.logging import disable_progress_bar

from eval.canvas.data import GRID, PATCH, SIZE, vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
MODEL_DIR = Path(__file__).parent / "model"


def build_tokenizer(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the task's words; it starts every text with <s> and pads on the left."""
    words = [*SPECIAL, *vocabulary(names)]
    backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The LLaVA processor of 128-pixel pictures: 256 placeholders per <image>."""
    side = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A LLaVA with fresh weights from torch's global generator: a 5-layer CLIP tower, a 6-layer Llama, 128 wide."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    _set_start_values(model)
    return model


def grid_positions(width: int) -> torch.Tensor:
    """2-D sin-cos codes of the patch grid, (GRID * GRID, width): half of the channels row, half column."""
    rates = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * rates  # (GRID, width / 4)
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (GRID, width / 2)
    rows = code[:, None].expand(GRID, GRID, -1)
    columns = code[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, width)


@torch.no_grad()
def _set_start_values(model: LlavaForConditionalGeneration) -> None:
    """Start values that find neighbours and matching words early.

    The tower's positions are sin-cos codes and its heads begin by looking at neighbouring patches. The decoder's keys
    start equal to its queries, so a word begins by looking at visual tokens that resemble it.
    """
    tower, decoder = model.model.vision_tower, model.model.language_model
    for part in (tower, decoder, model.model.multi_modal_projector):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.5 * embeddings.patch_embedding.weight[0].numel() ** -0.5)
    nn.init.zeros_(embeddings.position_embedding.weight)
    embeddings.position_embedding.weight[1:] = grid_positions(tower.config.hidden_size)
    nn.init.normal_(decoder.embed_tokens.weight, std=decoder.config.hidden_size**-0.5)
    for number, layer in enumerate(tower.encoder.layers):
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        if number < len(tower.encoder.layers) - 1:
            queries, keys = _neighbour_weights(tower.config.hidden_size, NEIGHBOURS[number % len(NEIGHBOURS)])
            attention.q_proj.weight.mul_(0.3).add_(queries)
            attention.k_proj.weight.mul_(0.3).add_(keys)
        for module in (attention.out_proj, layer.mlp.fc2):
            module.weight.mul_((2 * tower.config.num_hidden_layers) ** -0.5)
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.mul_((2 * decoder.config.num_hidden_layers) ** -0.5)


# Row and column offsets, in patches, that the four heads of a tower layer begin by looking at.
NEIGHBOURS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
)


def _neighbour_weights(width: int, offsets: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key weights, (width, width), with which head h attends around `offsets[h]` from each patch.

    On the codes of `grid_positions`, moving by an offset is a rotation of each (sin, cos) pair; the queries carry it.
    """
    quarter, pairs = width // 4, width // 4 // 4  # channels per (axis, sin or cos); pairs per axis and head
    rates = (1.0 / 100 ** (torch.arange(quarter) / quarter))[:pairs]
    queries, keys = torch.zeros(width, width), torch.zeros(width, width)
    rows = torch.arange(pairs)
    for head, offset in enumerate(offsets):
        for axis in (0, 1):
            sin_in, cos_in = axis * width // 2 + rows, axis * width // 2 + quarter + rows
            sin_out = head * quarter + axis * 2 * pairs + rows
            cos_out = sin_out + pairs
            turn = rates * offset[axis]
            keys[sin_out, sin_in] = 1.0
            keys[cos_out, cos_in] = 1.0
            queries[sin_out, sin_in], queries[sin_out, cos_in] = turn.cos(), turn.sin()
            queries[cos_out, cos_in], queries[cos_out, sin_in] = turn.cos(), -turn.sin()
    return queries, keys


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    """Write the model in bfloat16 with its processor, so that the Auto classes load both from `folder`."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    config = model.config
    model.generation_config = GenerationConfig(
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )
    dtype = config.dtype
    config.dtype = torch.bfloat16
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        config.dtype = dtype
    processor.save_pretrained(folder)


def load(
    folder: str | Path = MODEL_DIR, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """The trained model, in eval mode, and its processor; `folder` as written by `export`."""
    disable_progress_bar()  # of a load that takes a blink
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor
