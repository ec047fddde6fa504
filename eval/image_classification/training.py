"""Train a model on pictures and test it on others, through timm's tasks, optimizers, schedules, mixup and averages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.task.evaluator import ClassificationEvaluator
from timm.task.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import nn

import vltok
from eval.image_classification.preprocess import Task

CHUNK = 10  # steps between two looks at the clock and the loss


@dataclass(frozen=True)
class Recipe:
    """How long and how a model trains.

    Attributes:
        epochs: Passes over the training pictures, a fraction is fine.
        steps: Steps, in the place of epochs.
        batch_size: Pictures of a step.
        lr: Peak learning rate; a cosine takes it to a hundredth.
        warmup: Share of the steps in which the rate rises.
        optimizer: As timm names it.
        weight_decay: Not on biases and norms.
        label_smoothing: Share of the target that all classes get.
        mixup: Timm's mixup alpha, 0 for none.
        cutmix: Timm's cutmix alpha, 0 for none.
        clip_grad: Largest norm of all gradients together, none by default.
        ema: Decay of the average of the weights that is tested and kept, 0 for the last ones.
        distill: Of arms with a start: share of the loss that is the distance from it.
        distill_by: "logits", by their divergence, or "features", by the squared error of what the classifier sees.
        temperature: Divides the logits of both.
    """

    epochs: float = 10.0
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
    ema: float = 0.0
    distill: float = 0.0
    distill_by: str = "logits"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("warmup", "label_smoothing", "ema", "distill")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"these are shares from 0 to 1, got {wrong}")
        above = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "temperature")}
        above |= {name: getattr(self, name) for name in ("clip_grad", "steps") if getattr(self, name) is not None}
        if wrong := {name: value for name, value in above.items() if value <= 0}:
            raise ValueError(f"these must be above 0, got {wrong}")
        if min(self.weight_decay, self.mixup, self.cutmix) < 0:
            raise ValueError("weight decay, mixup and cutmix must be from 0 on")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch size, got {self.batch_size}")
        if self.distill_by not in ("logits", "features"):
            raise ValueError(f"distillation is by logits or features, got {self.distill_by!r}")

    def total_steps(self, pictures: int) -> int:
        """Steps for so many training pictures; an epoch leaves out an incomplete batch."""
        return self.steps or max(1, round(self.epochs * (pictures // self.batch_size)))

    def task(self, model: nn.Module, teacher: nn.Module | None, device: str) -> TrainingTask:
        """timm's training task: the labels' loss, and what the teacher says of the same pictures."""
        device = torch.device(device)
        loss = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup or self.cutmix else self.label_smoothing)
        if teacher is None or not self.distill:
            return ClassificationTask(model, loss, device=device, verbose=False)
        weights = {"task_loss_weight": 1 - self.distill, "distill_loss_weight": self.distill}
        common = weights | {"device": device, "verbose": False}
        if self.distill_by == "features":
            return FeatureDistillationTask(model, teacher, loss, **common)
        return LogitDistillationTask(model, teacher, loss, temperature=self.temperature, **common)

    def optimise(self, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
        """timm's optimizer, and its cosine schedule with warm-up, to be told of every step.

        Raises:
            ValueError: If timm knows no such optimizer.
        """
        try:
            optimizer = create_optimizer_v2(model, opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"timm can't make the optimizer {self.optimizer!r}: {error}") from error
        low = {"warmup_lr": self.lr / 100, "min_lr": self.lr / 100, "warmup_epochs": round(self.warmup * steps)}
        schedule, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=steps, step_on_epochs=False, updates_per_epoch=1, **low
        )
        return optimizer, schedule


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Top-1 and top-5 accuracy as shares and the mean cross entropy on test pictures; leaves the model's mode alone.

    Top-5 is left out where there are no more than five classes.
    """
    was_training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(task.device)
    classes = 0
    for images, labels in task.test_batches():
        with task.autocast():
            logits = model(images)
        evaluator.update(logits, labels)
        classes = logits.shape[1]
    model.train(was_training)
    found = evaluator.compute()
    figures = {"top1": found["top1"] / 100, "loss": found["loss"], "tested": evaluator.num_samples}
    return figures | ({"top5": found["top5"] / 100} if classes > 5 else {})


def fit(
    model: nn.Module,
    handle: vltok.Handle | None,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    teacher: nn.Module | None = None,
    eval_every: int | None = None,
    advance: Callable[[str], Any] = lambda note: None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a model in place.

    Args:
        model: The model, on the task's device.
        handle: Of its methods, whose losses are added.
        task: The pictures.
        recipe: Budget and optimizer.
        seed: Of the order of pictures, of their augmentation, and of dropout.
        teacher: The trained model it started from, None where it starts anew. If there is one, it is tested before the
            first step too.
        eval_every: Steps between tests; by default an epoch. After the last step there always is one.
        advance: Told after every step how it goes.

    Returns:
        The trained model, the average of the weights where the recipe keeps one; and the figures of the last test,
        "curve" with all of them against steps, "seconds" without tests, and "images_per_second", the median rate.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    steps = recipe.total_steps(task.count)
    eval_every = eval_every or max(1, task.count // recipe.batch_size)
    random_seed(seed)
    learning = recipe.task(model, teacher, task.device)
    optimizer, schedule = recipe.optimise(learning.get_trainable_module(), steps)
    if recipe.ema:
        learning.setup_ema(recipe.ema)
    kept = unwrap_model(learning.get_eval_model(ema=True)) if recipe.ema else model
    mixes = recipe.mixup or recipe.cutmix
    classes = getattr(model, "num_classes", None)
    mix = (
        Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        if mixes
        else None
    )
    batches = task.training_batches(recipe.batch_size, seed)
    curve = [] if teacher is None else [{"step": 0, **evaluate(model, task)}]
    learning.train()
    losses: list[torch.Tensor] = []
    since_test: list[float] = []
    rates: list[float] = []
    seconds, began = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = next(batches)
        if mix is not None:
            images, labels = mix(images, labels)
        with task.autocast():
            loss = learning(images, labels)["loss"]
            if handle is not None:
                loss = loss + handle.loss()
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        schedule.step_update(step)
        learning.update_ema(step)
        losses.append(loss.detach())
        is_due = step % eval_every == 0 or step == steps
        if len(losses) == CHUNK or is_due:
            since_test += _finite(torch.stack(losses), step)
            elapsed = time.perf_counter() - began
            seconds += elapsed
            rates.append(len(losses) * recipe.batch_size / elapsed)
            losses.clear()
            if is_due:
                figures = {"train_loss": statistics.fmean(since_test), "lr": optimizer.param_groups[0]["lr"]}
                curve.append({"step": step, **figures, **evaluate(kept, task)})
                since_test.clear()
            began = time.perf_counter()
        advance(f"top-1 {100 * curve[-1]['top1']:.1f} %" if curve else "")
    last = {name: curve[-1][name] for name in ("top1", "top5", "loss", "tested") if name in curve[-1]}
    return kept, {**last, "curve": curve, "seconds": seconds, "images_per_second": statistics.median(rates)}


def _finite(losses: torch.Tensor, step: int) -> list[float]:
    if not losses.isfinite().all():
        raise FloatingPointError(
            f"the loss became {losses[-1]:.3g} at or before step {step}; a smaller --lr, a longer --warmup or "
            "--clip-grad may help"
        )
    return losses.tolist()
