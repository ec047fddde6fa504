"""`vltok families`: which models vltok knows and what it does on them, as a table, also for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vltok.families import Supported
    from vltok.families.support import ModelSupport, TowerSupport

BEGIN, END = "<!-- python -m vltok families -->", "<!-- end of families -->"
BEGIN_BRIEF = "<!-- python -m vltok families, in brief -->"


def families(
    into: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Write it into this file, between its two markers.")
    ] = None,
) -> None:
    """Print which models vltok knows, and what it does on them."""
    if into is not None:
        text = into.read_text(encoding="utf-8")
        writers = {BEGIN: markdown, BEGIN_BRIEF: brief}
        found = [begin for begin in writers if f"{begin}\n" in text]
        try:
            (begin,) = found
            before, rest = text.split(f"{begin}\n")
            _, after = rest.split(END)
        except ValueError:
            ways = " or ".join(writers)
            typer.secho(f"error: {into} must have {ways} once, on a line, and {END} behind it", err=True, fg="red")
            raise typer.Exit(1) from None
        into.write_text(f"{before}{begin}\n{writers[begin]()}{END}{after}", encoding="utf-8")
        return
    from vltok.families import supported_models
    from vltok.families.support import LEGEND

    models = supported_models()
    tables = [_table(supports.values()) for supports in models.values()]
    # A narrow terminal folds whole lines, which can be read; columns of three letters can't.
    wide = Console(width=1000)
    Console(width=max(wide.measure(table).maximum for table in tables)).print(*tables)
    Console(highlight=False).print(LEGEND, *notes(models), sep="\n")


def markdown() -> str:
    """The table as GitHub reads it."""
    from vltok.families import supported_models
    from vltok.families.support import LEGEND

    models, parts = supported_models(), []
    for supports in models.values():
        rows = [support.cells() for support in supports.values()]
        parts.append(_lines(list(rows[0]), [list(row.values()) for row in rows]))
    parts += [f"{LEGEND}\n", "".join(f"- {line}\n" for line in notes(models))]
    return "\n" + "\n".join(parts) + "\n"


def brief() -> str:
    """The names of all families, by what they take, as GitHub reads it."""
    from vltok.families import supported_models

    models = supported_models()
    titles: dict[str, list[str]] = {}
    for support in models["vlm"].values():
        titles.setdefault("images" if support.videos == "no" else "images and videos", []).append(support.title)
    titles["vision towers"] = [support.title for support in models["tower"].values()]
    rows = [[kind, ", ".join(sorted(names, key=str.lower))] for kind, names in titles.items()]
    return f"\n{_lines(['Takes', 'Families'], rows)}\n"


def notes(models: Supported) -> Iterator[str]:
    """What doesn't fit the table: which members of families are refused, and which models, and why."""
    from vltok.families import refusals

    for supports in models.values():
        for support in supports.values():
            if support.refuses:
                yield f"{support.title}: refuses {support.refuses}."
    for title, reason in refusals().items():
        yield f"{title}: refused, as {reason}."


def _lines(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])


def _table(supports: Iterable[ModelSupport | TowerSupport]) -> Table:
    rows = [support.cells() for support in supports]
    table = Table(*rows[0], box=SIMPLE)
    for row in rows:
        table.add_row(*row.values())
    return table
