"""Reading released weights: finding those of one module in a state dict, and saying what doesn't fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vltok.checks import check_finite, weight_faults
from vltok.errors import CheckpointError


def weights_around(state_dict: Mapping[str, torch.Tensor], anchor: str) -> dict[str, torch.Tensor]:
    """The weights that share the prefix of the first name ending in `anchor`, without that prefix."""
    prefix = next((name.removesuffix(anchor) for name in state_dict if name.endswith(anchor)), "")
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], title: str) -> None:
    """Give a module (on the meta device) copies of its weights, in their dtype and on their device.

    Raises:
        CheckpointError: If weights are missing, unexpected, of the wrong shape or kind, or not finite.
    """
    if faults := weight_faults(weights, module.state_dict()):
        raise CheckpointError(f"these are not the weights of {title}: {faults}")
    for name, value in weights.items():
        check_finite(name, value, "what was given")
    module.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
