"""A folder of pictures with questions and answers about them, as a LLaVA JSON file describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import picture
from train.records import record, write


@dataclass(frozen=True)
class Folder:
    """Eight conversations, each about one picture of its own size, with answers of one to three words."""

    path: Path
    records: list[dict[str, Any]]

    @property
    def file(self) -> Path:
        return self.path / "data.json"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Folder:
    path = tmp_path_factory.mktemp("data")
    records = []
    for i in range(8):
        picture(i, (40 + 8 * i, 56)).save(path / f"{i}.png")
        records.append(
            record(f"s{i}", [f"{i}.png"], "<image>\nw1 w2", f"w{i} " * (i % 3) + f"w{i + 9}", "w3", f"w{2 * i}")
        )
    write(path / "data.json", records)
    return Folder(path, records)
