"""The budget and the optimizer of a run, through timm's factories."""

import math
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How long and how a model trains.

    Attributes:
        epochs: Passes over the training pictures, a fraction is fine; the steps are rounded up.
        steps: Steps, in the place of epochs.
        batch_size: Pictures of a step.
        lr: Peak learning rate.
        warmup: Share of the steps in which the rate rises; then it falls along a cosine to a hundredth.
        optimizer: As timm names it.
        weight_decay: Not on biases and norms.
        label_smoothing: 0..1.
        mixup: timm's mixup alpha, 0 for none.
        cutmix: timm's cutmix alpha, 0 for none.
        clip_grad: Largest norm of all gradients together, None for no limit.
        amp: Whether matrix products are made in bfloat16.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 128
    lr: float = 1e-3
    warmup: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_grad: float | None = None
    amp: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give either epochs or steps, got {self.epochs} epochs and {self.steps} steps")
        if min(self.epochs or 0, self.steps or 0) < 0 or not (self.epochs or self.steps):
            raise ValueError("epochs and steps must be above 0")
        if self.lr <= 0 or not 0 <= self.warmup < 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"the rate must be above 0, warm-up and label smoothing in [0, 1), got {self.lr}, {self.warmup}, "
                f"{self.label_smoothing}"
            )
        if self.batch_size < 1 or self.weight_decay < 0 or self.mixup < 0 or self.cutmix < 0:
            raise ValueError("batch size must be at least 1, weight decay, mixup and cutmix from 0")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"the gradients' norm must be limited above 0, got {self.clip_grad}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch size, got {self.batch_size}")

    def total_steps(self, pictures: int) -> int:
        """Steps for so many training pictures; an epoch leaves out an incomplete batch."""
        return self.steps or max(1, math.ceil(self.epochs * (pictures // self.batch_size)))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """timm's optimizer for a model.

        Raises:
            ValueError: If timm knows no such optimizer.
        """
        try:
            return create_optimizer_v2(model, opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"timm can't make the optimizer {self.optimizer!r}: {error}") from error

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        """timm's cosine schedule with warm-up, told of every step."""
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=steps,
            warmup_epochs=round(self.warmup * steps),
            warmup_lr=self.lr / 100,
            min_lr=self.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        return schedule

    def make_mixup(self, num_classes: int) -> Mixup | None:
        """timm's mixup and cutmix of a batch, which smooths the labels too; None for neither."""
        if not self.mixup and not self.cutmix:
            return None
        return Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=num_classes)
