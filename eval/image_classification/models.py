"""Models of the arms: made by timm from a seed, given trained weights where there are some, then the methods."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.utils import random_seed
from torch import nn

import vltok
import vltok.models  # registers the papers' backbones with timm


@dataclass(frozen=True)
class ModelSpec:
    """Which timm model, and where its first weights come from.

    Attributes:
        name: As timm names it.
        kwargs: For timm.create_model.
        pretrained: Whether timm fetches its published weights.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    def create(self, seed: int, num_classes: int) -> nn.Module:
        """Make the model without methods; its random weights follow from the seed.

        Raises:
            ValueError: If timm knows no such model, or doesn't take the arguments.
        """
        if not timm.is_model(self.name) and not self.pretrained:
            near = difflib.get_close_matches(self.name, timm.list_models(), 5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"timm has no model {self.name!r}{hint}. timm.list_models() names them all")
        random_seed(seed)
        try:
            return timm.create_model(self.name, self.pretrained, **{"num_classes": num_classes} | dict(self.kwargs))
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"timm can't make {self.name} with {dict(self.kwargs)}: {error}") from error

    def build(
        self, seed: int, num_classes: int, methods: Sequence[vltok.Method] = (), weights: Path | None = None
    ) -> tuple[nn.Module, vltok.Handle | None]:
        """Make the model, put weights and methods on it; see `equip`."""
        model = self.create(seed, num_classes)
        return model, equip(model, seed, methods, weights)


def equip(
    model: nn.Module, seed: int, methods: Sequence[vltok.Method] = (), weights: Path | None = None
) -> vltok.Handle | None:
    """Put weights and methods on a model.

    Args:
        model: The model, without methods.
        seed: Of all that starts at random in the methods.
        methods: The methods, in order.
        weights: A file of weights, of the model without methods or with them.

    Returns:
        The handle of the methods, None if there are none.

    Raises:
        ValueError: If the weights don't fit.
    """
    state = None if weights is None else read_weights(weights)
    is_plain = state is not None and (not methods or state.keys() == model.state_dict().keys())
    if is_plain:
        _load(model, state, weights)
    random_seed(seed)
    handle = vltok.apply(model, methods) if methods else None
    if state is not None and not is_plain:
        _load(model, state, weights)
    return handle


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file, or from a .pth file of tensors alone.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    try:
        return load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, AttributeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no file of weights that can be read safely: {error}") from error


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Changes with the names and values of weights, wherever they come from."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _load(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    parts = {"missing": missing, "unknown": unexpected, "of another shape": shapes}
    if text := "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts.items() if names):
        raise ValueError(f"{path} doesn't fit {type(model).__name__}: {text}")
    model.load_state_dict(state)
