"""`python -m vltok.serving`: what vLLM's `--hf-overrides` takes, to serve a model pruned or condensed."""

from __future__ import annotations

import json
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("python -m vltok.serving needs typer: python -m pip install 'vltok[cli]'") from error

from vltok.errors import VltokError
from vltok.serving.overrides import vllm_overrides

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="Folder of the model, or its model type, such as llava.")],
    method: Annotated[
        str,
        typer.Argument(help='A selector as text, such as "divprune,keep_ratio=0.25", or the folder of a condenser.'),
    ],
    max_keep_ratio: Annotated[float | None, typer.Option(help="The largest share that a request may ask for.")] = None,
    max_num_keep: Annotated[int | None, typer.Option(help="The largest count that a request may ask for.")] = None,
) -> None:
    """Print what vLLM's --hf-overrides takes, to serve a model pruned or condensed."""
    try:
        typer.echo(json.dumps(vllm_overrides(model, method, max_keep_ratio, max_num_keep)))
    except (VltokError, ValueError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m vltok.serving")
