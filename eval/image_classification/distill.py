"""Distillation: what a student loses by differing from its teacher, in the logits and in the features."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Distillation:
    """How a started arm learns from the model it started from.

    Attributes:
        weight: Share of the loss that is the divergence from the teacher's logits; the rest is that of the labels.
        temperature: Divides the logits of both.
        features: Weight of the error of the blocks' outputs, added on top; 0 for none.
    """

    weight: float = 0.0
    temperature: float = 2.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"the share of distillation must be in 0..1, got {self.weight}")
        if self.temperature <= 0 or self.features < 0:
            raise ValueError(
                f"temperature must be above 0 and the features' weight from 0, got {self.temperature}, {self.features}"
            )

    @property
    def is_on(self) -> bool:
        """Whether a teacher is needed."""
        return self.weight > 0 or self.features > 0


class Teacher:
    """A frozen model whose logits and block outputs a student is compared with."""

    def __init__(self, model: nn.Module, distillation: Distillation) -> None:
        self.model = model.eval().requires_grad_(False)
        self.distillation = distillation
        if distillation.features:
            _blocks(model)

    @contextmanager
    def watch(self, student: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Within the block, the dict holds the outputs of the student's blocks in its last call."""
        with _recorded(student, bool(self.distillation.features)) as features:
            yield features

    def loss(
        self, images: torch.Tensor, logits: torch.Tensor, features: dict[str, torch.Tensor], label_loss: torch.Tensor
    ) -> torch.Tensor:
        """Mix the labels' loss with what the teacher says about the same pictures.

        Args:
            images: What the student saw, (B, C, H, W).
            logits: What it answered, (B, classes).
            features: Outputs of its blocks, by name.
            label_loss: Its loss on the labels, a scalar.

        Raises:
            ValueError: If a block's output has another shape than the teacher's.
        """
        settings = self.distillation
        with torch.no_grad(), _recorded(self.model, bool(settings.features)) as wanted:
            answers = self.model(images)
        loss = (1 - settings.weight) * label_loss
        if settings.weight:
            loss = loss + settings.weight * kl_divergence(logits, answers, settings.temperature)
        if settings.features:
            loss = loss + settings.features * feature_error(features, wanted)
        return loss


def kl_divergence(logits: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(wanted || logits) at a temperature, mean over the batch, times the temperature squared.

    The square keeps the size of the gradient, whatever the temperature.
    """
    log_probs, log_wanted = ((x.float() / temperature).log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(log_probs, log_wanted, reduction="batchmean", log_target=True) * temperature**2


def feature_error(features: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Squared error of each block's output as a share of the wanted output's mean square, mean over the blocks."""
    errors = []
    for name, target in wanted.items():
        if features[name].shape != target.shape:
            raise ValueError(
                f"{name} gives {tuple(features[name].shape)} in the student, {tuple(target.shape)} in the teacher; "
                "features can only be distilled where shapes stay"
            )
        target = target.float()
        errors.append(F.mse_loss(features[name].float(), target) / target.square().mean())
    return torch.stack(errors).mean()


@contextmanager
def _recorded(model: nn.Module, is_on: bool) -> Iterator[dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda module, args, output: found.__setitem__(name, output)

    handles = [block.register_forward_hook(keep(name)) for name, block in _blocks(model).items()] if is_on else []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs timm calls the model's features.

    Raises:
        ValueError: If timm names none.
    """
    names = [info["module"] for info in getattr(model, "feature_info", ())]
    if not names:
        raise ValueError(f"timm names no features of {type(model).__name__}, so only its logits can be distilled")
    return {name: model.get_submodule(name) for name in names}
