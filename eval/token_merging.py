"""How much faster a ViT of timm is with merged tokens.

    python -m eval.token_merging
    python -m eval.token_merging --model vit_base_patch16_224 --merges 8,16 --device cuda --json token_merging.json

One model in eval mode, plain and with ToMe at several r, that is so many patches fewer after every block, run in turns
in one process on noise pictures. A ratio is the median over the rounds of the ratios within a round. How good the
answers are is not asked here, see `eval.image_classification`.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import vltok
from eval.measure import machine, numbers, timed


@dataclass(frozen=True)
class Result:
    """The model at one r.

    Attributes:
        r: Patches merged away in every block; 0 is the plain model.
        patches: Patches that leave the last block.
        pictures_per_second: Median; for orientation, it holds for this machine at this hour only.
        faster: How many times as many as the plain model.
    """

    r: int
    patches: int
    pictures_per_second: float
    faster: float


def measure(model: str, merges: list[int], batch: int, device: str, rounds: int, seconds: float) -> list[Result]:
    """Time the model at every r, the plain one first."""
    torch.manual_seed(0)
    plain = timm.create_model(model).eval().to(device)
    x = torch.randn(batch, *plain.default_cfg["input_size"], device=device)
    sides: dict[int, nn.Module] = {0: plain}
    for r in merges:
        sides[r] = copy.deepcopy(plain)
        vltok.apply(sides[r], vltok.ToMe(r=r))

    @torch.no_grad()
    def look(side: nn.Module) -> torch.Tensor:
        return side.forward_features(x)

    left = {r: look(side).shape[1] - plain.num_prefix_tokens for r, side in sides.items()}
    runs = {str(r): lambda side=side: look(side) for r, side in sides.items()}
    times = timed(runs, lambda: None, device, rounds, seconds)
    return [
        Result(
            r,
            left[r],
            batch / statistics.median(times[str(r)]),
            statistics.median(base / own for base, own in zip(times["0"], times[str(r)], strict=True)),
        )
        for r in sides
    ]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with one, the clock is its own CPU time.")] = 1,
    model: Annotated[str, typer.Option(help="A ViT of timm.")] = "deit_small_patch16_224",
    merges: Annotated[str, typer.Option(help="Patches to merge away in every block.")] = "4,8,13,16",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 7,
    seconds: Annotated[float, typer.Option(help="Stop after so long, but not before three rounds.")] = 120.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Measure what merging tokens gains."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}", param_hint="--device")
    torch.set_num_threads(threads)
    results = measure(model, numbers(merges), batch, device, rounds, seconds)
    about = machine(device)
    table = Table("r", "patches left", "pictures/s", "times as fast", title=f"{model}, batch {batch}")
    for each in results:
        table.add_row(str(each.r), str(each.patches), f"{each.pictures_per_second:.1f}", f"{each.faster:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()), highlight=False)
    if json_path is not None:
        content = {"machine": about, "model": model, "results": [asdict(each) for each in results]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
