"""save() and load(): the methods on a model as a small folder, settings as JSON and added weights as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vltok.api import Handle, apply
from vltok.errors import CheckpointError
from vltok.method import Method
from vltok.version import __version__

CONFIG_FILE = "vltok_config.json"
WEIGHTS_FILE = "vltok.safetensors"
_FIELDS = {"vltok_version", "family", "methods"}


def save(handle: Handle, folder: str | Path) -> None:
    """Write the methods of a handle: vltok_config.json, and vltok.safetensors if they brought weights.

    Args:
        handle: What `apply` returned, still attached.
        folder: Where to; made if it is missing.

    Raises:
        ValueError: If the handle was removed.
    """
    if not handle.is_attached:
        raise ValueError("this handle was removed from its model, so there is nothing to save; save before remove()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "vltok_version": __version__,
        "family": handle.family,
        "methods": [method.to_dict() for method in handle.methods],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    if weights := added_state_dict(handle):
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)


def load(model: nn.Module, folder: str | Path, *, processor: Any = None) -> Handle:
    """Apply the methods saved in a folder to a model, with their weights.

    Args:
        model: A model of the family they were saved from.
        folder: What `save` wrote.
        processor: The model's processor, where a method needs it.

    Returns:
        The handle, as from `apply`.

    Raises:
        FileNotFoundError: If the folder has no vltok_config.json.
        CheckpointError: If the file names an unknown method or field, another family, or the weights don't fit.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; give a folder written by vltok.save()")
    config = _read(path)
    writer = config["vltok_version"]
    methods = [Method.from_dict(data, writer) for data in config["methods"]]
    handle = apply(model, methods, processor=processor)
    try:
        if handle.family != config["family"]:
            raise CheckpointError(
                f"{folder} was saved from a {config['family']} model, this is a {handle.family} model"
            )
        _load_weights(handle, folder / WEIGHTS_FILE)
    except BaseException:
        handle.remove()
        raise
    return handle


def added_state_dict(handle: Handle) -> dict[str, torch.Tensor]:
    """Weights the handle's methods brought into the model, by their names in the model."""
    names = {module: name for name, module in handle.model.named_modules()}
    return {
        f"{names[module]}.{key}": tensor
        for module in handle.added_modules
        for key, tensor in module.state_dict().items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(config, dict) or (missing := _FIELDS - config.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing if isinstance(config, dict) else _FIELDS))}")
    if unknown := config.keys() - _FIELDS:
        raise CheckpointError(
            f"{path} has unknown fields {', '.join(sorted(unknown))} (written by vltok {config['vltok_version']})"
        )
    methods = config["methods"]
    if not isinstance(methods, list) or not all(isinstance(settings, dict) for settings in methods):
        raise CheckpointError(f'{path}: "methods" must be a list of settings, one per method, got {methods!r}')
    return config


def _load_weights(handle: Handle, path: Path) -> None:
    expected = added_state_dict(handle)
    if not expected and not path.exists():
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if found.keys() != expected.keys():
        raise CheckpointError(
            f"{path} doesn't fit: missing {sorted(expected.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - expected.keys())}"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            if tensor.shape != found[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(found[name].shape)} in {path}, expected {tuple(tensor.shape)}"
                )
        for name, tensor in expected.items():
            tensor.copy_(found[name])
