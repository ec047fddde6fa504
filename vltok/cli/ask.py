"""`vltok ask`: a question about an image, answered with methods and without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from PIL import Image

    from vltok.report import Report


def ask(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub if it was fetched before.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    method: Annotated[
        list[str], typer.Option(help='A method as text, such as "divprune,keep_ratio=0.1"; may be given several times.')
    ] = ["todre,keep_ratio=0.1"],  # noqa: B006, typer wants a list
    compare: Annotated[bool, typer.Option("--compare", help="Answer without a method, too.")] = False,
    max_words: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Draw which visual tokens were kept into this PNG, methods side by side.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device; the GPU if there is one.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Let the model be fetched from the hub.")] = False,
) -> None:
    """Ask a model about an image under one or several methods."""
    from PIL import Image, UnidentifiedImageError

    from vltok.cli.asking import Asked
    from vltok.errors import VltokError

    try:
        picture = Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        _stop(f"{image} can't be opened as an image: {error}", error)
    try:
        asked = Asked.load(model, download, device)
    except (OSError, ValueError) as error:
        _stop(f"{model} can't be loaded: {error}", error)
    table = Table("Method", "Answer", "Visual tokens", "KV cache", "Time", box=SIMPLE)
    drawings = []
    for text in ([None] if compare else []) + method:
        try:
            answer = asked.answer([picture], question, text, max_words)
            if out is not None and text is not None and answer.report.keep_indices:
                drawings.append(_drawing(picture, answer.report))
        except (VltokError, ValueError) as error:
            _stop(f"{text}: {error}", error)
        table.add_row(text or "none", answer.text, *_costs(answer.report), f"{answer.seconds:.2f} s")
    Console(highlight=False).print(table)
    if drawings:
        _side_by_side(drawings).save(out)
        typer.echo(f"drew {out}")


def _costs(report: Report) -> tuple[str, str]:
    """How many visual tokens there were, and the size of the KV cache where pruning saw it."""
    if report.visual_tokens:
        tokens = f"{sum(report.kept_tokens[0])} of {sum(report.visual_tokens[0])}"
        return tokens, f"{report.kv_bytes / 2**20:.2f} MiB"
    condensed = report.condensed
    return ("" if condensed is None else f"{condensed.tokens} for {condensed.patches} patches"), ""


def _drawing(picture: Image.Image, report: Report) -> Image.Image:
    from vltok.drawing import draw_kept

    return draw_kept(picture, report.keep_indices[0][0], report.grids[0][0])


def _side_by_side(drawings: list[Image.Image]) -> Image.Image:
    from PIL import Image

    width, height = drawings[0].size
    whole = Image.new("RGB", (len(drawings) * (width + 8) - 8, height), "white")
    for number, drawing in enumerate(drawings):
        whole.paste(drawing, (number * (width + 8), 0))
    return whole


def _stop(message: str, error: Exception) -> NoReturn:
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(1) from error
