"""What the contract's tests share: prompts for every pair, ways to call a model, and what a model consists of."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import Pair
from tiny import TinyFamily, picture, shared_model

PROMPTS = ["w1 <image> w2 w3", "w4 <image> w5 w6 w7 <image> w8 w9 w1", "w3 w4"]
ALONE = [0, 1, 1]  # the row each picture belongs to


@functools.lru_cache
def pictures(family: TinyFamily):
    return [picture(0, family.size), picture(1, family.other_size), picture(2, family.size)]


@functools.lru_cache
def plain(family: TinyFamily):
    """The prompts for the untouched model."""
    return family.inputs(PROMPTS, pictures(family))


@functools.lru_cache
def batch(pair: Pair, side: str = "left"):
    return pair.inputs(PROMPTS, pictures(pair.family), padding_side=side)


@functools.lru_cache
def single(pair: Pair, row: int):
    return pair.inputs(
        [PROMPTS[row]], [p for p, owner in zip(pictures(pair.family), ALONE, strict=True) if owner == row]
    )


@functools.lru_cache
def prompt(pair: Pair, text: str, seeds: tuple[int, ...] = (0,)):
    """One prompt with pictures of the family's size."""
    return pair.inputs([text], [picture(seed, pair.family.size) for seed in seeds])


@functools.lru_cache
def saved_files(family: TinyFamily) -> dict[str, bytes]:
    """What save_pretrained writes of the untouched model."""
    with tempfile.TemporaryDirectory() as folder:
        shared_model(family).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(inputs: Any) -> dict[str, torch.Tensor]:
    """The pictures among the inputs."""
    return {name: value for name, value in inputs.items() if "pixel_values" in name}


def positions(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
    """The rotary positions of unpadded prompts as the model counts them, (B, T) or (axes, B, T)."""
    if hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "image_grid_thw", "mm_token_type_ids", "attention_mask")
        return model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]
    return torch.arange(inputs["input_ids"].shape[1]).expand(len(inputs["input_ids"]), -1)


def promise(what: str, check: Callable[[Pair, torch.nn.Module], None], pair: Pair, model: torch.nn.Module) -> None:
    """Check a promise; or skip it where the family's row says that the unpruned model breaks it, and see that it does.

    Args:
        what: What it is about, as in `unable` of the row.
        check: Fails if the promise is broken.
        pair: The pair.
        model: The model.
    """
    if what not in pair.family.unable:
        return check(pair, model)
    with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError, ValueError)):
        check(pair.unpruned, model)
    pytest.skip(f"the unpruned model can't: {what}")


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: Any, **options: Any) -> torch.Tensor:
    return model(**inputs, **options).logits


def generate(model: torch.nn.Module, inputs: Any, steps: int = 5, **options: Any) -> torch.Tensor:
    """The words a model adds, (B, steps)."""
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**inputs, **options)[:, -steps:]


def fingerprint(model: torch.nn.Module) -> dict[str, object]:
    """Everything of a model that a method could leave behind."""
    modules = dict(model.named_modules())
    return {
        "children": list(modules),
        "classes": [type(module) for module in modules.values()],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, module in modules.items()
        },
        "modes": [module.training for module in modules.values()],
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
    }


def same_picks(one: list, other: list) -> bool:
    """Whether two reports' keep_indices are equal."""
    flat = [[picks.tolist() for row in report for picks in row] for report in (one, other)]
    return flat[0] == flat[1]
