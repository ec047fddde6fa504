"""The command line, `vltok`: each command is a file of this package, and loads what it needs when it runs."""

from __future__ import annotations

import typer

from vltok.cli.ask import ask
from vltok.cli.check import check
from vltok.cli.families import families
from vltok.cli.methods import methods
from vltok.cli.others import convert, train
from vltok.cli.serve import serve

HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Compress the visual tokens of vision-language models. In Python: vltok.apply(model, method)."""


app.command()(methods)
app.command()(families)
app.command()(check)
app.command()(ask)
for command in (train, convert):
    app.command(context_settings=HANDED_ON, add_help_option=False)(command)
app.command(context_settings={"allow_extra_args": True})(serve)
