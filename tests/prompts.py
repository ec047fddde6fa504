"""Prompts with one, several and no images that the tests of all families share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import reference
import torch
from tiny import TinyFamily, picture
from transformers import LlamaForCausalLM

import vltok
from vltok import Selector
from vltok.visual import AttentionRequest, VisualTokens

PROMPTS = {  # the text, and for each image whether it has the family's size (0) or its other size (1)
    "text around": ("w1 w2 <image> w3 w4", [0]),
    "image first": ("<image> w5 w6", [1]),
    "image last": ("w7 <image>", [1]),
    "two images": ("w4 <image> w5 w6 w7 w8 <image> w9", [1, 0]),
    "adjacent images": ("w1 <image><image> w2 <image> w3", [0, 1, 0]),
    "text only": ("w3 w4", []),
}
BATCH = ["two images", "text around", "image first", "text only"]

# What the installed transformers calls the KV cache, and all words its models take for it.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
CACHE_WORDS = sorted({CACHE, "past_key_values"})
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # inputs with a number for each token


def pictures(family: TinyFamily, name: str):
    sizes = PROMPTS[name][1]
    return [picture(seed, (family.size, family.other_size)[size]) for seed, size in enumerate(sizes)]


def single(family: TinyFamily, name: str):
    """The inputs of one prompt."""
    return family.inputs([PROMPTS[name][0]], pictures(family, name))


def batch(family: TinyFamily, side: str = "left", names: list[str] = BATCH):
    """The inputs of several prompts, padded on one side."""
    images = [image for name in names for image in pictures(family, name)]
    return family.inputs([PROMPTS[name][0] for name in names], images, padding_side=side)


def row(model: torch.nn.Module, family: TinyFamily, name: str) -> reference.Row:
    """The same prompt for the reference."""
    return reference.read(model, family, PROMPTS[name][0], pictures(family, name))


def rows(model: torch.nn.Module, family: TinyFamily, names: list[str] = BATCH) -> list[reference.Row]:
    return [row(model, family, name) for name in names]


def generate(model: torch.nn.Module, inputs, steps: int = 5, **options) -> torch.Tensor:
    """The words a model adds, (B, steps)."""
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**inputs, **options)[:, -steps:]


@dataclass(frozen=True)
class Probe(Selector):
    """Shows what a selector is given, and keeps the first tokens of every image."""

    kind: str = "none"
    layer: int = -1
    seen: list[VisualTokens] = field(default_factory=list, compare=False)

    def attention_request(self, has_cls: bool) -> AttentionRequest | None:
        return None if self.kind == "none" else AttentionRequest(self.kind, self.layer)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        self.seen.append(visual)
        return torch.arange(num_keep).expand(len(visual.embeddings), -1)


def probe(model: torch.nn.Module, inputs, kind: str = "none", layer: int = -1) -> list[VisualTokens]:
    """What a selector is given for these inputs: one VisualTokens for each length that images have."""
    method = Probe(num_keep=1, kind=kind, layer=layer)
    with vltok.apply(model, method):
        model(**inputs)
    return method.seen


def packed(model: torch.nn.Module, family: TinyFamily, names: list[str]) -> dict:
    """Several prompts in one row without a mask: positions start again with each, on every axis the model has."""
    singles = [single(family, name) for name in names]
    positions = [row(model, family, name).positions for name in names]
    if family.axes > 1:  # transformers wants the text's own count in front, by which it tells samples apart
        positions = [torch.cat([torch.arange(p.shape[-1])[None], p]) for p in positions]
    images = [image for name in names for image in pictures(family, name)]
    inputs = dict(family.inputs([" ".join(PROMPTS[name][0] for name in names)], images))
    joined = {
        key: torch.cat([s[key] for s in singles], dim=1) for key in ("input_ids", "mm_token_type_ids") if key in inputs
    }
    inputs.pop("attention_mask")
    return {**inputs, **joined, "position_ids": torch.cat(positions, dim=-1).unsqueeze(-2)}


def turn(inputs: dict, said: torch.Tensor, new: torch.Tensor, word_type: int = 0) -> dict:
    """The whole conversation so far, (B, T), with new words (B, N) behind it, and none of its images.

    `word_type` is what `token_type_ids` says of words behind the prompt.
    """
    ids = torch.cat([said, new], dim=1)
    extra = ids.shape[1] - inputs["attention_mask"].shape[1]
    talk = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)}
    for name, value in (("mm_token_type_ids", 0), ("token_type_ids", word_type)):
        if name in inputs:
            talk[name] = torch.nn.functional.pad(inputs[name], (0, extra), value=value)
    return talk


def hide(inputs: dict, left: int = 0, right: int = 0) -> dict:
    """The inputs with more padding on either side of every row."""
    wide = dict(inputs)
    for key in TOKENS:
        if key in wide:
            wide[key] = torch.nn.functional.pad(wide[key], (left, right))
    return wide
