"""Steps of training: phases and their rates, and an optimizer for matrices beside one for everything else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eval.canvas.muon import Muon


@dataclass(frozen=True)
class Phase:
    """One training phase: how many steps of which batch, at which peak rates; they fall to `end` of them."""

    name: str
    steps: int
    batch_size: int
    muon_rate: float
    adam_rate: float
    end: float
    min_items: int


def rate_factor(step: int, phase: Phase) -> float:
    """Linear warm-up over the first 5 % (at most 100 steps), then linear down to `end`."""
    warm = min(100, max(1, phase.steps // 20))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, phase.steps - warm)
    return 1 - done * (1 - phase.end)


def make_optimizers(
    parts: Iterable[nn.Module], readouts: Iterable[nn.Parameter] = (), muon: bool = True, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon, or none, for the matrices of modules; AdamW for embeddings, norms, biases, `readouts` and what is left."""
    named = [pair for part in parts for pair in part.named_parameters()]
    # in_proj holds three matrices, whose changes have to be independent of each other's sizes.
    is_own = [p.ndim == 2 and "embed" not in name and "in_proj" not in name and muon for name, p in named]
    others = [*readouts, *(p for (_, p), own in zip(named, is_own, strict=True) if not own)]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    matrices = [p for (_, p), own in zip(named, is_own, strict=True) if own]
    return [Muon(matrices, weight_decay=weight_decay), adam] if muon else [adam]


def take_step(
    loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer], step: int, phase: Phase, what: str
) -> None:
    """Learn from a loss at the rates of a phase's step.

    Raises:
        FloatingPointError: If the loss is not finite; `what` is named.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss of {what} became {loss.item()} at step {step}")
    for optimizer in optimizers:
        rate = phase.muon_rate if isinstance(optimizer, Muon) else phase.adam_rate
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, phase)
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def average(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the records that have it."""
    names = {name: None for record in records for name in record}
    pairs = {name: [record[name] for record in records if name in record] for name in names}
    return {name: round(sum(values) / len(values), 4) for name, values in pairs.items()}
