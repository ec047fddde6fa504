"""recompute(): turns on the recomputation of activations under whichever name the installed transformers has for it."""

from __future__ import annotations

from torch import nn

_NAMES = ("activation_checkpointing", "gradient_checkpointing")  # the first from 5.23 on


def recompute(model: nn.Module, reentrant: bool) -> None:
    """Let a model of transformers compute the activations of its layers again in the backward pass."""
    name = next(name for name in _NAMES if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
