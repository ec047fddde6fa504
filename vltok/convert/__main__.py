"""`python -m vltok.convert`: turn checkpoints of other programs into folders that transformers and vltok load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("python -m vltok.convert needs typer: python -m pip install 'vltok[convert]'") from error

from vltok.errors import VltokError

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Turn checkpoints of other programs into folders that transformers and vltok load. Nothing is downloaded."""


@app.command()
def tokenpacker(
    official_dir: Annotated[
        Path, typer.Argument(help="Official LLaVA-TokenPacker checkpoint, or a folder with mm_projector.bin.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    vision_tower: Annotated[
        Path | None, typer.Option(help="Local folder of the CLIP model; its weights replace those in the checkpoint.")
    ] = None,
    scale_factor: Annotated[
        int | None, typer.Option(min=1, help="If the config doesn't say: 2 for 144 visual tokens, 3 for 64, 4 for 36.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a file of weights, in 10^9 bytes.")] = 2.0,
) -> None:
    """Convert a LLaVA-TokenPacker checkpoint, for vltok.from_pretrained (a lone projector: for vltok.load)."""
    from vltok.convert.token_packer import convert

    try:
        summary = convert(
            official_dir,
            out,
            vision_tower=vision_tower,
            scale_factor=scale_factor,
            dtype=dtype,
            max_shard_bytes=int(max_shard_gb * 1e9),
            progress=True,
        )
    except (VltokError, ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    typer.echo(summary)


if __name__ == "__main__":
    app()
