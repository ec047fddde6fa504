"""`python -m vltok families`: which models vltok knows and what it does on them, as a table, also for the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vltok.families import Supported, refusals, supported_models
from vltok.families.support import LEGEND, ModelSupport, TowerSupport

BEGIN, END = "<!-- python -m vltok families -->", "<!-- end of families -->"


def families(
    into: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Write it into this file, between its two markers.")
    ] = None,
) -> None:
    """Print which models vltok knows, and what it does on them."""
    if into is not None:
        text = into.read_text(encoding="utf-8")
        try:
            before, rest = text.split(f"{BEGIN}\n")
            _, after = rest.split(END)
        except ValueError:
            typer.secho(f"error: {into} must have {BEGIN} once, on a line, and {END} behind it", err=True, fg="red")
            raise typer.Exit(1) from None
        into.write_text(f"{before}{BEGIN}\n{markdown()}{END}{after}", encoding="utf-8")
        return
    models = supported_models()
    tables = [_table(supports.values()) for supports in models.values()]
    # A narrow terminal folds whole lines, which can be read; columns of three letters can't.
    wide = Console(width=1000)
    Console(width=max(wide.measure(table).maximum for table in tables)).print(*tables)
    Console(highlight=False).print(LEGEND, *notes(models), sep="\n")


def markdown() -> str:
    """The table as GitHub reads it."""
    models, parts = supported_models(), []
    for supports in models.values():
        rows = [support.cells() for support in supports.values()]
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    parts += [f"{LEGEND}\n", "".join(f"- {line}\n" for line in notes(models))]
    return "\n" + "\n".join(parts) + "\n"


def notes(models: Supported) -> Iterator[str]:
    """What doesn't fit the table: which members of families are refused, and which models, and why."""
    for supports in models.values():
        for support in supports.values():
            if support.refuses:
                yield f"{support.title}: refuses {support.refuses}."
    for title, reason in refusals().items():
        yield f"{title}: refused, as {reason}."


def _table(supports: Iterable[ModelSupport | TowerSupport]) -> Table:
    rows = [support.cells() for support in supports]
    table = Table(*rows[0], box=SIMPLE)
    for row in rows:
        table.add_row(*row.values())
    return table
