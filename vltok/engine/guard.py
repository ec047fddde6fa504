"""Checkpoints that must not load silently: a note in the config of what is on the model, and names nobody can look up.

Weights that a method brought, or took the place of, are not in a plain model: transformers would draw them at random
and say little. So while such a method is on, a field of the config that transformers looks up by name when it builds
the part holds a text in its place. The error of a checkpoint saved meanwhile quotes that text.
"""

from __future__ import annotations

from typing import Any

from vltok.edits import Edits

CONFIG_FIELD = "vltok"  # of a model's config: what was on it when it was saved
PROJECTOR_GUARD = "vltok projector: load this checkpoint with vltok.from_pretrained"
ATTENTION_GUARD = "vltok attention: load this checkpoint with vltok.from_pretrained"


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
