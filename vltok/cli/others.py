"""`vltok train` and `vltok convert`: command lines of their own, which load much more than this one."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Fine-tune a model with methods on it, as `python -m vltok.train`; --help lists its options."""
    from vltok.train.cli import app

    app(context.args, prog_name="vltok train")


def convert(context: typer.Context) -> None:
    """Turn released checkpoints into folders of vltok, as `python -m vltok.convert`; --help lists them."""
    from vltok.convert.__main__ import app

    app(context.args, prog_name="vltok convert")
