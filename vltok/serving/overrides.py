"""Writes what a server is started with: one line instead of architecture names and settings to remember."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vltok.errors import CheckpointError, UnsupportedModelError
from vltok.files import read_json
from vltok.method import Method
from vltok.serialization import CONFIG_FILE
from vltok.serving.architectures import ARCHITECTURES, CONDENSED
from vltok.serving.condenser import SavedCondenser
from vltok.serving.options import CONDENSER, FIELD, SAVED, Pruning, check_positions


def vllm_overrides(
    model: Any,
    method: str | Path | Method,
    max_keep_ratio: float | None = None,
    max_num_keep: int | None = None,
) -> dict[str, Any]:
    """Return the `hf_overrides` with which vLLM serves a model pruned, or with a condenser.

        llm = vllm.LLM(folder, hf_overrides=vltok.serving.vllm_overrides(folder, "divprune,keep_ratio=0.25"))
        llm = vllm.LLM(folder, hf_overrides=vltok.serving.vllm_overrides(folder, "condensed"))

    Nothing is loaded or downloaded, and vLLM need not be installed.

    Args:
        model: The model's folder, its config, or its `model_type`.
        method: A selector, or its text, such as "divprune,keep_ratio=0.25"; or the folder that `vltok.save` wrote of a
            condenser.
        max_keep_ratio: The largest share of the visual tokens that a request may ask for; by default the method's.
        max_num_keep: The largest count instead.

    Returns:
        Plain data, as JSON has it: for `vllm.LLM(hf_overrides=...)`, or dumped for `--hf-overrides`.

    Raises:
        CheckpointError: If the method or a setting is unknown, the model was saved with a method on it, or the folder
            of a condenser is damaged.
        UnsupportedInputError: If the model doesn't take the method's positions.
        UnsupportedModelError: If the model or the method can't be served.
        ValueError: If a setting is out of range.
    """
    config = _config_of(model)
    if isinstance(method, Path) or (isinstance(method, str) and (Path(method) / CONFIG_FILE).is_file()):
        if max_keep_ratio is not None or max_num_keep is not None:
            raise ValueError(
                "a condenser has as many tokens for every image; leave max_keep_ratio and max_num_keep out"
            )
        return _condensing(config, Path(method))
    own = ARCHITECTURES.get(config.model_type)
    if own is None:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r} can't be served pruned; these can: {', '.join(ARCHITECTURES)}"
        )
    method = Method.from_text(method) if isinstance(method, str) else method
    if not method.name:
        raise CheckpointError(f"a server finds a method by its name; give {type(method).__name__} one: @vltok.register")
    most = {"max_keep_ratio": max_keep_ratio, "max_num_keep": max_num_keep}
    field = {"method": method.name, **_settings(method), **{k: v for k, v in most.items() if v is not None}}
    field = json.loads(json.dumps(field))
    pruning = Pruning.of_config(SimpleNamespace(**{FIELD: field, SAVED: getattr(config, SAVED, None)}))
    check_positions(pruning.selector, own.has_axes)
    return {"architectures": [own.name], FIELD: field}


def vllm_command(model: Path, overrides: dict[str, Any], arguments: Sequence[str] = ()) -> str:
    """Return the command that serves a folder with these overrides, quoted for a shell.

    Args:
        model: The model's folder.
        overrides: What `vllm_overrides` returned.
        arguments: What follows.
    """
    return shlex.join(["vllm", "serve", str(model), "--hf-overrides", json.dumps(overrides), *arguments])


def _condensing(config: Any, folder: Path) -> dict[str, Any]:
    """The overrides for a condenser that was saved in a folder."""
    own = CONDENSED.get(config.model_type)
    if own is None:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r} can't be served with a condenser; these can: {', '.join(CONDENSED)}"
        )
    field = str(folder.resolve())
    SavedCondenser.of_config(SimpleNamespace(**{CONDENSER: field, SAVED: getattr(config, SAVED, None)}))
    return {"architectures": [own.name], CONDENSER: field}


def _config_of(model: Any) -> Any:
    """What is known of a model's config: its `model_type`, and whether vltok saved it."""
    if not isinstance(model, str | Path):
        if not isinstance(getattr(model, "model_type", None), str):
            raise CheckpointError(f"the model must be a folder, a config or a model type, got {type(model).__name__}")
        return model
    if (file := Path(model) / "config.json").is_file():
        return SimpleNamespace(**{"model_type": None, **read_json(file)})
    if str(model) in ARCHITECTURES:
        return SimpleNamespace(model_type=str(model))
    raise CheckpointError(
        f"{str(model)!r} is no folder with a config.json, and no model type that is served "
        f"({', '.join(ARCHITECTURES)}); nothing is downloaded here, so name the type of a model that is on a hub"
    )


def _settings(method: Method) -> dict[str, Any]:
    """The settings of a method that are not its defaults."""
    given = asdict(method)
    return {
        field.name: given[field.name]
        for field in fields(method)
        if field.default is MISSING or getattr(method, field.name) != field.default
    }
