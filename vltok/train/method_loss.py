"""Adding the loss of methods to any trainer of transformers, such as one that fine-tunes an image classifier."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer

from vltok.api import Handle

T = TypeVar("T", bound=Trainer)


def add_method_loss(trainer: T, handle: Handle) -> T:
    """Let a trainer add `handle.loss()` to the loss of its model, as the attention diversification loss needs it.

    trainer = add_method_loss(Trainer(model, args, train_dataset=data), vltok.apply(model, vltok.ADL()))

    Args:
        trainer: Of the model that the methods are on. `VltokTrainer` adds the loss by itself.
        handle: The methods.

    Returns:
        The trainer.

    Raises:
        ValueError: If the handle was removed.
    """
    if not handle.is_attached:
        raise ValueError("this handle was removed from its model, so its methods leave no loss; train before remove()")
    compute_loss = trainer.compute_loss

    def with_method_loss(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + method_loss(trainer, handle, num_items_in_batch).to(loss)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = with_method_loss
    return trainer


def method_loss(trainer: Trainer, handle: Handle, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The loss of the methods as it stands beside that of the model.

    A method's loss is a mean over one forward pass. The model's may be divided by the items of the whole step already;
    if it is, the trainer doesn't divide by the passes that make a step, which then remains to be done here.
    """
    is_whole = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_whole is None:
        is_whole = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_whole = is_whole or trainer.compute_loss_func is not None
    passes = trainer.current_gradient_accumulation_steps if is_whole and trainer.model.training else 1
    return handle.loss() / passes
