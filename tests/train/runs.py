"""Short training runs of tiny models, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import LLAVA, TinyFamily, picture

import vltok
from vltok.train import Collator, Conversations, Recipe, VltokTrainer, add_lora, set_trainable

RECIPE = Recipe("projector", learning_rate=3e-3, global_batch=2, per_device_batch=2)


def make(
    out: Path,
    data: Any,
    *,
    parts: str = "projector",
    method: vltok.Method | None = None,
    family: TinyFamily = LLAVA,
    lora: int | None = None,
    collator: dict[str, Any] | None = None,
    evaluate: Any = None,
    **arguments: Any,
) -> VltokTrainer:
    """A trainer of a fresh tiny model; with lora, `parts` train by LoRA of that rank. The same call gives the same."""
    torch.manual_seed(0)
    processor = family.processor()
    handle = vltok.apply(family.model(), method or vltok.TokenPacker(scale_factor=2), processor=processor)
    set_trainable(handle, parts)
    model = handle.model if lora is None else add_lora(handle, lora)
    settings = {"grad_accum": 1, "max_steps": 6, "save_steps": 3, "disable_tqdm": True} | arguments
    samples = Conversations(data.records, data.path) if hasattr(data, "path") else data
    args = RECIPE.arguments(out, **settings)
    return VltokTrainer(handle, args, Collator(processor, **collator or {}), samples, evaluate, model=model)


def losses(trainer: VltokTrainer) -> list[float]:
    """Loss of every step so far."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: VltokTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.weights.model.state_dict().items()}


@torch.no_grad()
def outputs(handle: vltok.Handle, family: TinyFamily = LLAVA, processor: Any = None) -> torch.Tensor:
    """Logits for a prompt with a picture."""
    processor = processor or handle.processor
    inputs = family.inputs(["w1 <image> w2 w3"], [picture(3, family.size)], processor=processor)
    return handle.model.eval()(**inputs).logits
