"""Recipe: the published training settings as data, and the TrainingArguments they make on the machine at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from vltok.train.prompt import Style

# What versions of transformers call the recomputation of activations: the first from 5.23 on.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in _NAMES if name in {field.name for field in fields(TrainingArguments)})


@dataclass(frozen=True)
class Recipe:
    """Settings of one training stage. Warm-up, then cosine decay to 0; AdamW; gradient checkpointing; bf16 on GPUs.

    Attributes:
        train: Parts that train, see `set_trainable`.
        learning_rate: Peak learning rate.
        global_batch: Samples per step over all devices and accumulated batches.
        per_device_batch: Samples per device and forward pass; where it is published, on 8 devices of 80 GB.
        epochs: Passes over the data.
        warmup_ratio: Share of all steps that warms up.
        weight_decay: Weight decay.
        max_length: Most tokens of a sample, visual tokens included.
        style: How prompts look, see `PromptWriter`.
        pad_to_square: Whether pictures are padded to a square, where a processor would crop them to one.
    """

    train: str
    learning_rate: float
    global_batch: int
    per_device_batch: int
    epochs: float = 1.0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048
    style: Style = "auto"
    pad_to_square: bool = False

    def arguments(
        self,
        output_dir: str | Path,
        *,
        per_device_batch: int | None = None,
        grad_accum: int | None = None,
        **overrides: Any,
    ) -> TrainingArguments:
        """Make the arguments of a trainer.

        Args:
            output_dir: Where checkpoints go.
            per_device_batch: Samples per device and forward pass; by default the recipe's.
            grad_accum: Batches to accumulate per step; by default as many as make the recipe's global batch on the
                processes that run (WORLD_SIZE).
            overrides: Any fields of `transformers.TrainingArguments`, by their names in any version of it.

        Raises:
            ValueError: If no number of accumulated batches makes the global batch.
        """
        batch = self.per_device_batch if per_device_batch is None else per_device_batch
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if grad_accum is None:
            if batch < 1 or self.global_batch % (batch * processes):
                raise ValueError(
                    f"{batch} samples per device on {processes} processes don't make up the global batch of "
                    f"{self.global_batch}; give a per-device batch that divides {self.global_batch // processes}, or "
                    "the number of batches to accumulate (grad_accum)"
                )
            grad_accum = self.global_batch // (batch * processes)
        on_cpu = not torch.accelerator.is_available()
        settings: dict[str, Any] = {
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": grad_accum,
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "warmup_steps": self.warmup_ratio,  # a number below 1 is a share of all steps
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": "cosine",
            "bf16": not on_cpu and is_torch_bf16_gpu_available(),
            CHECKPOINTING: True,
            f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},  # the reentrant kind needs inputs with gradients
            "logging_steps": 1,
            "save_steps": 500,
            "save_total_limit": 2,
            "dataloader_num_workers": 0 if on_cpu else 4,
            "report_to": "none",
            "use_cpu": on_cpu,
        }
        overrides = {_installed_name(name): value for name, value in overrides.items()}
        return TrainingArguments(output_dir=str(output_dir), **settings | overrides)


def _installed_name(name: str) -> str:
    """What the installed transformers calls a field of TrainingArguments."""
    spelling = next((spelling for spelling in _NAMES if name in (spelling, f"{spelling}_kwargs")), None)
    return name if spelling is None else CHECKPOINTING + name.removeprefix(spelling)


PRETRAIN = Recipe("projector", learning_rate=1e-3, global_batch=256, per_device_batch=32, style="plain")
FINETUNE = Recipe("projector+llm", learning_rate=2e-5, global_batch=128, per_device_batch=16, pad_to_square=True)
RECIPES = {"pretrain": PRETRAIN, "finetune": FINETUNE}
