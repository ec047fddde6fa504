"""Checkpoints that must not load silently: a note in the config of what is on the model, and names nobody can look up.

Weights that a method brought, or took the place of, are not in a plain model: transformers would draw them at random
and say little. So while such a method is on, a field of the config that transformers looks up by name when it builds
the part holds a text in its place. The error of a checkpoint saved meanwhile quotes that text. The note beside it says
which methods were on, and what those fields held before, so that the model can be built as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vltok.edits import Edits
from vltok.errors import CheckpointError

CONFIG_FIELD = "vltok"  # of a model's config: what was on it when it was saved
PROJECTOR_GUARD = "vltok projector: load this checkpoint with vltok.from_pretrained"
ATTENTION_GUARD = "vltok attention: load this checkpoint with vltok.from_pretrained"
_PARTS = {"config", "vision_config", "processor"}  # whose fields a note holds


def mark_checkpoint(edits: Edits, config: Any, settings: dict[str, Any], restore: dict[str, dict[str, Any]]) -> None:
    """Note in a config what is on its model, so that a checkpoint saved meanwhile says how to load it.

    Args:
        edits: The ledger of the handle.
        config: The config.
        settings: Methods of the handle, see `vltok.api.settings`; those of earlier handles stay before them.
        restore: What fields of "config", "vision_config" and "processor" held before.
    """
    if before := getattr(config, CONFIG_FIELD, None):
        settings = {**settings, "methods": [*before["methods"], *settings["methods"]]}
        groups = restore.keys() | before["restore"].keys()
        restore = {group: restore.get(group, {}) | before["restore"].get(group, {}) for group in sorted(groups)}
    edits.set_attribute(config, CONFIG_FIELD, {**settings, "restore": restore})


def marked_configs(config: Any) -> Iterator[Any]:
    """The config, and those nested in it, that say what was on their model."""
    if hasattr(config, CONFIG_FIELD):
        yield config
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            yield from marked_configs(part)


def read_note(config: Any, place: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the note in a config: what was on the model, and what fields held before, as `mark_checkpoint` takes them.

    Args:
        config: One of `marked_configs`.
        place: Where the config is, for errors.

    Raises:
        CheckpointError: If the note has no such fields.
    """
    note = getattr(config, CONFIG_FIELD)
    restore = note.get("restore") if isinstance(note, dict) else None
    if not isinstance(restore, dict) or not all(isinstance(fields, dict) for fields in restore.values()):
        raise CheckpointError(f"{place} doesn't say what fields held before methods came on the model")
    if unknown := restore.keys() - _PARTS:
        raise CheckpointError(f"{place} names parts that no method changes: {', '.join(map(repr, sorted(unknown)))}")
    return {name: value for name, value in note.items() if name != "restore"}, restore


def restore_fields(target: Any, fields: dict[str, Any], place: str) -> None:
    """Give fields of a config or a processor what they held before.

    Raises:
        CheckpointError: If the target has no such field or refuses the value, or a guard stays in another one.
    """
    for name, value in fields.items():
        if name.startswith("_") or callable(getattr(target, name, callable)):
            raise CheckpointError(f"{place} names {name!r}, which is no field of a {type(target).__name__}")
        try:
            setattr(target, name, value)
        except Exception as error:  # configs have checks and errors of their own
            raise CheckpointError(f"{place} has a value for {name!r} that doesn't fit: {error}") from error
    if guarded := [name for name, value in vars(target).items() if value in (PROJECTOR_GUARD, ATTENTION_GUARD)]:
        raise CheckpointError(f"{place} doesn't say what {', '.join(guarded)} held before methods came on the model")
