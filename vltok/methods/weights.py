"""Reading released weights: finding those of one module in a state dict, and saying what doesn't fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vltok.errors import CheckpointError


def weights_around(state_dict: Mapping[str, torch.Tensor], anchor: str) -> dict[str, torch.Tensor]:
    """The weights that share the prefix of the first name ending in `anchor`, without that prefix."""
    prefix = next((name.removesuffix(anchor) for name in state_dict if name.endswith(anchor)), "")
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], title: str) -> None:
    """Give a module (on the meta device) copies of its weights, in their dtype and on their device.

    Raises:
        CheckpointError: If weights are missing, unexpected or of the wrong shape; the message lists them.
    """
    expected = module.state_dict()
    problems = [f"missing {', '.join(names)}" for names in [sorted(expected.keys() - weights.keys())] if names]
    problems += [f"unexpected {', '.join(names)}" for names in [sorted(weights.keys() - expected.keys())] if names]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(f"these are not the weights of {title}: {'; '.join(problems)}")
    module.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
