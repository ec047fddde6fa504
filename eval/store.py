"""Finished measurements on disk, so that a command that was stopped goes on where it was.

    store = Store(Path("results/cells"))
    figures = store.get("clean", {"model": digest, "seed": 0}, lambda: measure(...))

Each measurement is one JSON file. Its settings are all that decides what comes out; measured with others it is another
file, so that nothing is ever mixed up and nothing needs to be refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.tables import write_json


class Store:
    """The measurements in a folder.

    Attributes:
        folder: Where they are; made when the first is written.
        notes: What is written beside each, such as the machine, and decides nothing.
    """

    def __init__(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        self.folder, self.notes = folder, dict(notes or {})

    def path(self, name: str, settings: Mapping[str, Any]) -> Path:
        """The file of a measurement: its name, for people, and a digest of the name and the settings."""
        exact = json.dumps([name, settings], sort_keys=True, allow_nan=False)
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "result"
        return self.folder / f"{word}-{hashlib.sha256(exact.encode()).hexdigest()[:16]}.json"

    def read(self, name: str, settings: Mapping[str, Any]) -> Any | None:
        """What was measured, as JSON gives it back; None if it wasn't yet.

        Raises:
            ValueError: If the file is damaged or of another measurement.
        """
        path = self.path(name, settings)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            is_own = (found["name"], found["settings"]) == (name, plain(settings))
            result = found["result"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no finished measurement: {error!r}; remove it to measure anew") from error
        if not is_own:
            raise ValueError(f"{path} holds another measurement than its name says; remove it to measure anew")
        return result

    def write(self, name: str, settings: Mapping[str, Any], result: Any) -> Any:
        """Keep a result other than None, on disk at once; returns it as JSON gives it back."""
        if result is None:
            raise ValueError(f"the result of {name} is None, which stands for one that is missing")
        content = {"name": name, "settings": plain(settings), "result": result, "notes": self.notes}
        write_json(self.path(name, settings), content)
        return plain(result)

    def get(self, name: str, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured, or what `measure` says now."""
        found = self.read(name, settings)
        return self.write(name, settings, measure()) if found is None else found


def plain(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value, allow_nan=False))
