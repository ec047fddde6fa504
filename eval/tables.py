"""Tables for people, as plain text and as markdown, and JSON written in one go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Table:
    r"""Rows under a head; cells may have several lines.

    Attributes:
        head: Names of the columns.
        title: What the table shows.
        notes: Sentences below it.
        left: So many columns, from the first on, are aligned to the left, the others to the right.
        rows: The cells, as they are shown; a row of None is a rule between sections.
    """

    head: Sequence[str]
    title: str = ""
    notes: Sequence[str] = ()
    left: int = 1
    rows: list[Sequence[str] | None] = field(default_factory=list)

    def add(self, *cells: Any) -> None:
        """Add a row; None is shown as "-".

        Raises:
            ValueError: If there are not as many cells as columns.
        """
        if len(cells) != len(self.head):
            raise ValueError(f"the table has {len(self.head)} columns, got {len(cells)} cells: {cells}")
        self.rows.append(["-" if each is None else str(each) for each in cells])

    def section(self) -> None:
        """Draw a rule below the last row."""
        self.rows.append(None)

    def text(self) -> str:
        """The table in columns, for a terminal."""
        rows = [None if row is None else [cell.split("\n") for cell in row] for row in [self.head, None, *self.rows]]
        cells = [row for row in rows if row is not None]
        widths = [max(len(line) for row in cells for line in row[k]) for k in range(len(self.head))]
        lines = [self.title] if self.title else []
        for row in rows:
            if row is None:
                lines.append("  ".join("-" * width for width in widths))
                continue
            for number in range(max(map(len, row))):
                parts = [cell[number] if number < len(cell) else "" for cell in row]
                lines.append("  ".join(map(self._align, range(len(parts)), parts, widths)).rstrip())
        return "\n".join([*lines, *self.notes]) + "\n"

    def markdown(self) -> str:
        """The table for a README; rules between sections are left out."""
        lines = [f"**{self.title}**", ""] if self.title else []
        shown = [self.head, ["---" if k < self.left else "---:" for k in range(len(self.head))]]
        for row in [*shown, *(row for row in self.rows if row is not None)]:
            cells = (cell.replace("\n", "<br>").replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note))]) + "\n"

    def _align(self, column: int, text: str, width: int) -> str:
        return text.ljust(width) if column < self.left else text.rjust(width)


def sentence(facts: Mapping[str, Any]) -> str:
    """Facts in one line: "torch: 2.13.0, threads: 1"."""
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one go: a crash leaves the old one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
