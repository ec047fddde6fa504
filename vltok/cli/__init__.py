"""The command line, `python -m vltok`: each command is a file of this package."""

from __future__ import annotations

import typer

from vltok.cli.families import families
from vltok.cli.serve import serve

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Compress the visual tokens of vision-language models. In Python: vltok.apply(model, method)."""


app.command()(families)
app.command(context_settings={"allow_extra_args": True})(serve)
