"""unchanged(): a block must leave models exactly as they were, down to the identity of every attribute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Fail if the block changes a module, hook, attribute, mode, weight or config field of one of the models."""
    before = [_snapshot(model) for model in models]
    yield
    for model, (objects, weights, config) in zip(models, before, strict=True):
        objects_now, weights_now, config_now = _snapshot(model)
        assert list(objects_now) == list(objects)
        assert [place for place in objects if objects_now[place] is not objects[place]] == []
        assert list(weights_now) == list(weights)
        assert [name for name in weights if not torch.equal(weights_now[name], weights[name])] == []
        assert config_now == config


def _snapshot(model: nn.Module) -> tuple[dict[tuple[str, ...], Any], dict[str, torch.Tensor], Any]:
    objects: dict[tuple[str, ...], Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            objects[name, key] = value
            if isinstance(value, dict):  # children, parameters, hooks
                objects.update({(name, key, str(inner)): item for inner, item in value.items()})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = getattr(model, "config", None)
    return objects, weights, config.to_dict() if hasattr(config, "to_dict") else config
