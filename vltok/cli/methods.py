"""`vltok methods`: which methods there are, and the settings of one."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, to be told its settings.")] = None,
) -> None:
    """Print the methods as texts name them, or what one of them does and takes."""
    from vltok.method import methods_by_name

    known, console = methods_by_name(), Console(highlight=False, soft_wrap=name is not None)
    if name is None:
        table = Table("Name", "Class", "Training-free", "What it does", box=SIMPLE)
        for key, cls in sorted(known.items()):
            table.add_row(key, cls.__name__, "yes" if cls.training_free else "no", _first_line(cls))
        console.print(table)
        return
    if name not in known:
        typer.secho(f"error: unknown method {name!r}; known are {', '.join(sorted(known))}", err=True, fg="red")
        raise typer.Exit(1)
    cls = known[name]
    console.print(inspect.getdoc(cls), markup=False)
    settings = [_setting(field) for field in fields(cls)]
    console.print(f"\nAs text: {','.join([name, *settings])}", markup=False)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _setting(field: Any) -> str:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return f"{field.name}=..." if default is MISSING else f"{field.name}={default}"
