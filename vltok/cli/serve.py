"""`vltok serve`: the command that starts vLLM's server with pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of the model.")],
    method: Annotated[
        str,
        typer.Argument(help='A selector as text, such as "divprune,keep_ratio=0.25", or the folder of a condenser.'),
    ],
    max_keep_ratio: Annotated[float | None, typer.Option(help="The largest share that a request may ask for.")] = None,
    max_num_keep: Annotated[int | None, typer.Option(help="The largest count that a request may ask for.")] = None,
    own_budgets: Annotated[
        bool, typer.Option("--own-budgets", help="Let requests say how much is kept of their images.")
    ] = False,
) -> None:
    """Print the command line that serves a model pruned with vLLM. What follows behind -- is handed on to vLLM."""
    from vltok.errors import VltokError
    from vltok.serving.overrides import vllm_command, vllm_overrides

    try:
        overrides = vllm_overrides(model, method, max_keep_ratio, max_num_keep)
    except (VltokError, ValueError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    trust = ["--trust-request-mm-kwargs"] if own_budgets or max_keep_ratio or max_num_keep else []
    typer.echo(vllm_command(model, overrides, [*trust, *context.args]))
