"""Models of the arms: made by timm from a seed, given trained weights where there are some, then the methods."""

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

import vltok
import vltok.models  # registers the papers' backbones with timm
from eval.image_classification.randomness import seed_all


@dataclass(frozen=True)
class ModelSpec:
    """Which timm model, and where its first weights come from.

    Attributes:
        name: As timm names it.
        kwargs: For timm.create_model.
        pretrained: Whether timm fetches its published weights.
        new_head: Leave out the classifier of weights that are read from a file, it starts anew.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    new_head: bool = False

    def create(self, seed: int, num_classes: int) -> nn.Module:
        """Make the model without methods; its random weights follow from the seed.

        Raises:
            ValueError: If timm knows no such model, or doesn't take the arguments.
        """
        if not timm.is_model(self.name) and not self.pretrained:
            near = difflib.get_close_matches(self.name, timm.list_models(), 5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"timm has no model {self.name!r}{hint}. timm.list_models() names them all")
        seed_all(seed)
        try:
            return timm.create_model(self.name, self.pretrained, **{"num_classes": num_classes} | dict(self.kwargs))
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"timm can't make {self.name} with {dict(self.kwargs)}: {error}") from error

    def build(
        self, seed: int, num_classes: int, methods: Sequence[vltok.Method] = (), weights: Path | None = None
    ) -> tuple[nn.Module, vltok.Handle | None]:
        """Make the model, put weights and methods on it.

        Args:
            seed: Of everything that starts at random: the same in the model, whatever the methods are.
            num_classes: Classes of the data, unless `kwargs` say another number.
            methods: The methods, in order.
            weights: A file of weights, of the model without methods or with them.

        Returns:
            The model and the handle of its methods, None if there are none.

        Raises:
            ValueError: If the weights don't fit.
        """
        model = self.create(seed, num_classes)
        return model, equip(model, seed, methods, weights, new_head=self.new_head)


def equip(
    model: nn.Module,
    seed: int,
    methods: Sequence[vltok.Method] = (),
    weights: Path | None = None,
    *,
    new_head: bool = False,
) -> vltok.Handle | None:
    """Put weights and methods on a model; see `ModelSpec.build`. Returns the handle of the methods."""
    state = None if weights is None else read_weights(weights)
    if state is not None and new_head:
        head = {name: value for name, value in model.state_dict().items() if _is_classifier(model, name)}
        state = {name: value for name, value in state.items() if not _is_classifier(model, name)} | head
    is_plain = state is not None and state.keys() == model.state_dict().keys()
    if state is not None and (is_plain or not methods):
        _load(model, state, weights)
    seed_all(seed)
    handle = vltok.apply(model, methods) if methods else None
    if state is not None and methods and not is_plain:
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


def weights_checksum(path: Path) -> str:
    """Changes with the bytes of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _load(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unknown": unexpected, "of another shape": shapes}
        text = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts.items() if names)
        is_head = bool(shapes) and all(_is_classifier(model, name) for name in shapes)
        hint = "; with --weights, --new-head starts the classifier anew" if is_head else ""
        raise ValueError(f"{path} doesn't fit {type(model).__name__}: {text}{hint}")
    model.load_state_dict(state)


def _is_classifier(model: nn.Module, name: str) -> bool:
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()  # what timm says of its models
    return any(name.startswith(f"{head}.") for head in ([heads] if isinstance(heads, str) else heads))
