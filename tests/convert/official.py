"""Tiny official TokenPacker checkpoints, and by hand what they compute.

Only sizes and words are made up: names, config fields and files are the official ones, the language model is a
LlamaForCausalLM and the tower a CLIP of 24 thin layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TEXT, WORDS, picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPModel, LlamaForCausalLM, PreTrainedTokenizerFast

import vltok
from vltok.convert.token_packer import convert

LEVELS = (12, 16, 22, 23)
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 24, "num_attention_heads": 2}
CLIP |= {"image_size": 56, "patch_size": 14}
EMBED_DIM, SCALE, SIDE = 256, 2, 4
ROWS = 48  # of the embeddings; the tokenizer has 43 words
LM = {**TEXT, "vocab_size": ROWS, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "pad_token_id": 0}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def official_projector(seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights of an official projector, bare names."""
    hidden, dim = LM["hidden_size"], CLIP["hidden_size"]
    shapes = {"q_proj_1.weight": (EMBED_DIM, dim), "clip_attn.in_proj_weight": (3 * EMBED_DIM, EMBED_DIM)}
    shapes |= {"clip_attn.in_proj_bias": (3 * EMBED_DIM,)}
    sizes = {"k_proj_1": (4 * dim, EMBED_DIM), "v_proj_1": (4 * dim, EMBED_DIM), "mlp": (EMBED_DIM, hidden)}
    layers = {f"{name}.0": size for name, size in sizes.items()}
    layers |= {f"{name}.2": (size[1], size[1]) for name, size in sizes.items()}
    for name, (inputs, outputs) in {**layers, "clip_attn.out_proj": (EMBED_DIM, EMBED_DIM)}.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for norm in ("ln_q_1", "ln_k_1", "ln_v_1"):
        shapes |= {f"{norm}.weight": (EMBED_DIM,), f"{norm}.bias": (EMBED_DIM,)}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        for name, shape in shapes.items()
    }


@dataclass
class Official:
    """An official checkpoint in memory and what it was made from."""

    llama: LlamaForCausalLM
    clip: CLIPModel
    projector: dict[str, torch.Tensor]
    config: dict[str, Any]

    def weights(self, with_tower: bool = False) -> dict[str, torch.Tensor]:
        """All tensors by their official names, with the buffers that came along at the time."""
        weights = dict(self.llama.state_dict())
        weights |= {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.items()}
        weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
        if with_tower:
            weights |= {TOWER_PREFIX + name: tensor for name, tensor in self.clip.vision_model.state_dict().items()}
            weights[f"{TOWER_PREFIX}embeddings.position_ids"] = torch.arange(17)[None]
        return {name: tensor.clone() for name, tensor in weights.items()}


def save_tokenizer(folder: Path, specials: list[str], **named: str) -> None:
    """Write a word-level tokenizer that knows w0 ... w39 after its special tokens."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*specials, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **named}
    PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(folder)


def write(folder: Path, config: dict[str, Any] | None, weights: dict[str, torch.Tensor], packing: str) -> Path:
    """Write a checkpoint: "bin" or "safetensors", in one file or, with "sharded " before it, in three with an index."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        save_tokenizer(folder, ["<unk>", "<s>", "</s>"])  # as Vicuna's: no <pad> and no <image>
    kind = packing.rpartition(" ")[2]
    stem, save = ("pytorch_model", torch.save) if kind == "bin" else ("model", save_file)
    if not packing.startswith("sharded"):
        save(weights, folder / f"{stem}.{kind}")
        return folder
    weight_map = {name: f"{stem}-{number % 3 + 1:05}-of-00003.{kind}" for number, name in enumerate(weights)}
    for file in sorted(set(weight_map.values())):
        save({name: tensor for name, tensor in weights.items() if weight_map[name] == file}, folder / file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def prompt(processor: Any) -> Any:
    return processor(text="<s> w1 <image> w2 w3", images=picture(5), return_tensors="pt")


@torch.no_grad()
def official_logits(official: Official, inputs: Any, image_id: int) -> torch.Tensor:
    """What the official parts compute for a prompt, put together by hand."""
    states = official.clip.vision_model(inputs.pixel_values, output_hidden_states=True).hidden_states
    features = torch.cat([states[level][:, 1:] for level in LEVELS], dim=-1)
    packer = vltok.nn.TokenPackerProjector.from_official(official.projector, SIDE, SCALE, num_heads=EMBED_DIM // 128)
    ids, is_image = inputs.input_ids, inputs.input_ids == image_id
    embeddings = official.llama.model.embed_tokens(ids.masked_fill(is_image, 0))
    embeddings[is_image] = packer(features).flatten(0, 1)
    return official.llama(inputs_embeds=embeddings, attention_mask=inputs.attention_mask).logits


def check(out: Path, official: Official) -> None:
    """Load a converted folder and compare its logits."""
    handle = vltok.from_pretrained(out)
    inputs = prompt(handle.processor)
    image_id = handle.model.config.image_token_id
    assert (inputs.input_ids == image_id).sum() == (SIDE // SCALE) ** 2
    with torch.no_grad():
        logits = handle.model(**inputs).logits[..., :ROWS]
    expected = official_logits(official, inputs, image_id)
    known = [column for column in range(ROWS) if column not in (image_id, handle.processor.tokenizer.pad_token_id)]
    torch.testing.assert_close(logits[..., known], expected[..., known], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1, "flat logits would compare equal whatever the model does"


def every_weight(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model's files, as the index names them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name, file in index.items():
        with safe_open(folder / file, framework="pt") as opened:
            weights[name] = opened.get_tensor(name)
    return weights


def refused(source: Path, out: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Check that a conversion fails with a message and leaves nothing behind."""
    there = set(out.parent.iterdir())
    with pytest.raises(error, match=message):
        convert(source, out, **options)
    assert set(out.parent.iterdir()) == there
