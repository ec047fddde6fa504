"""Train a model on pictures and test it on others."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vltok
from eval.image_classification.augment import training_batches
from eval.image_classification.distill import Teacher
from eval.image_classification.randomness import seed_all
from eval.image_classification.recipe import Recipe
from eval.image_classification.task import Task

CHUNK = 10  # steps between two looks at the clock and the loss
TOP = 5


@dataclass
class Clock:
    """Where the time of training went, evaluations left out."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    rates: list[float] = field(default_factory=list)  # pictures per second of each chunk of steps

    def figures(self) -> dict[str, float]:
        """Seconds in all, the share in which pictures were made ready, and the median rate."""
        share = self.data_seconds / self.seconds if self.seconds else 0.0
        rate = statistics.median(self.rates) if self.rates else 0.0
        return {"seconds": self.seconds, "data_share": share, "images_per_second": rate}


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int = 256) -> dict[str, float]:
    """Top-1 and, with more than five classes, top-5 accuracy as shares, and the mean cross entropy, on test pictures.

    The model is in the same mode afterwards as before.
    """
    was_training = model.training
    model.eval()
    hits, hits_top, loss, count = 0, 0, 0.0, 0
    for images, labels in task.test.batches(torch.arange(len(task.test)), batch_size):
        images, labels = images.to(task.device), labels.to(task.device)
        with task.autocast():
            logits = model(task.preprocess.normalise(images))
        logits = logits.float()
        ranked = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        hits += int(ranked[:, 0].sum())
        hits_top += int(ranked.sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    model.train(was_training)
    if not count:
        raise ValueError("there was no test picture that could be decoded")
    figures = {"top1": hits / count, "loss": loss / count, "tested": count}
    return figures | ({"top5": hits_top / count} if task.num_classes > TOP else {})


def fit(
    model: nn.Module,
    handle: vltok.Handle | None,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    teacher: Teacher | None = None,
    eval_every: int | None = None,
    eval_first: bool = False,
    advance: Callable[[str], Any] = lambda note: None,
) -> dict[str, Any]:
    """Train a model in place.

    Args:
        model: The model, on the task's device.
        handle: Of its methods, whose losses are added.
        task: The pictures.
        recipe: Budget and optimizer.
        seed: Of the order of pictures, of their augmentation, and of dropout.
        teacher: What it also learns from.
        eval_every: Steps between evaluations; by default an epoch. After the last step there always is one.
        eval_first: Whether there is one before the first step.
        advance: Told after every step how it goes.

    Returns:
        The figures of the last evaluation, "curve" with all of them against steps, and those of the clock.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    steps = recipe.total_steps(len(task.train))
    eval_every = eval_every or max(1, len(task.train) // recipe.batch_size)
    seed_all(seed)
    optimizer = recipe.make_optimizer(model)
    schedule = recipe.make_schedule(optimizer, steps)
    mix = recipe.make_mixup(task.num_classes)
    batches = training_batches(task.train, task.augment, recipe.batch_size, seed)
    clock = Clock()
    curve = [{"step": 0, **evaluate(model, task)}] if eval_first else []
    model.train()
    losses: list[torch.Tensor] = []
    since_eval: list[float] = []
    with nullcontext({}) if teacher is None else teacher.watch(model) as features:
        started = time.perf_counter()
        for step in range(1, steps + 1):
            begun = time.perf_counter()
            images, labels = next(batches)
            images, labels = task.preprocess.normalise(images.to(task.device)), labels.to(task.device)
            if mix is not None:  # it mixes pairs; an odd one is only left where pictures were dropped
                even = len(images) // 2 * 2
                images, labels = mix(images[:even], labels[:even])
            clock.data_seconds += time.perf_counter() - begun
            with task.autocast():
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=0.0 if mix else recipe.label_smoothing)
                if teacher is not None:
                    loss = teacher.loss(images, logits, features, loss)
                if handle is not None:
                    loss = loss + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            schedule.step_update(step)
            losses.append(loss.detach())
            is_due = step % eval_every == 0 or step == steps
            if len(losses) == CHUNK or is_due:
                since_eval += _finite(losses, step)
                elapsed = time.perf_counter() - started
                clock.seconds += elapsed
                clock.rates.append(len(losses) * recipe.batch_size / elapsed)
                losses.clear()
                if is_due:
                    rate = optimizer.param_groups[0]["lr"]
                    figures = {"train_loss": statistics.fmean(since_eval), "lr": rate, **evaluate(model, task)}
                    curve.append({"step": step, **figures})
                    since_eval.clear()
                started = time.perf_counter()
            advance(_note(since_eval, curve))
    last = {name: curve[-1][name] for name in ("top1", "top5", "loss", "tested") if name in curve[-1]}
    return {**last, "steps": steps, "curve": curve, **clock.figures()}


def _finite(losses: Sequence[torch.Tensor], step: int) -> list[float]:
    values = torch.stack(list(losses)).tolist()
    if not torch.isfinite(torch.tensor(values)).all():
        raise FloatingPointError(
            f"the loss became {values[-1]} at or before step {step}; a smaller --lr, a longer --warmup or --clip-grad "
            "may help"
        )
    return values


def _note(since_eval: Sequence[float], curve: Sequence[dict[str, float]]) -> str:
    loss = f"loss {statistics.fmean(since_eval[-CHUNK:]):.3f} " if since_eval else ""
    return loss + (f"top-1 {100 * curve[-1]['top1']:.1f} %" if curve else "")
