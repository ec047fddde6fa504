"""What is on disk of a bench: a JSON file per model with one result for every cell, so that a later call goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.image_classification.records import differences, write_json


class Store:
    """The results of one model.

    Attributes:
        path: The file.
        settings: All that decides what the model is, a digest of its weights among it.
        notes: What is written beside it, without a meaning for what is measured.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        self.path, self.settings, self.notes = path, settings, notes
        self._cells: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self._cells = found["cells"]
                differ = differences(found["settings"], settings)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no file of results: {error!r}; choose another --out") from error
            if differ:
                raise self._other(differ)

    def read(self, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures of a cell, None if it wasn't measured yet.

        Raises:
            ValueError: If it was measured with other settings, naming those.
        """
        if cell not in self._cells:
            return None
        figures = dict(self._cells[cell])
        if differ := differences(figures.pop("settings"), settings):
            raise self._other([f"{cell}: {each}" for each in differ])
        return figures

    def write(self, cell: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Keep the figures of a cell, on disk at once."""
        self._cells[cell] = {**figures, "settings": dict(settings)}
        write_json(self.path, {**self.notes, "settings": dict(self.settings), "cells": self._cells})

    def _other(self, differ: list[str]) -> ValueError:
        return ValueError(
            f"{self.path} has results of other settings: {'; '.join(differ[:5])}. Choose another --out, or go on with "
            "the settings it has"
        )
