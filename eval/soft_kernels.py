"""What SOFT's two hand-written backward passes gain over autograd's, side by side in one process.

    python -m eval.soft_kernels

"mix" is `vltok.kernels.gaussian_mix`: tile by tile ("ours"), by whole kernel matrices ("plain"), and these computed a
second time rather than held, by torch.utils.checkpoint ("checkpoint"). "convolution" is `vltok.kernels.depthwise`
beside torch's own. Forward and backward of each run in turns; a ratio is the median of the ratios within a round.
Memory is the peak above inputs and gradients, see `eval.measure.peak_bytes`. A hand-written pass is kept where it takes
10 % less time or 20 % less memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eval.measure import peak_bytes, timed
from vltok.kernels.depthwise import depthwise_conv2d
from vltok.kernels.gaussian_mix import definition, gaussian_mix

MIXES = ((2, 196, 49, 32), (24, 576, 49, 64), (2, 3136, 49, 32), (2, 12544, 49, 32), (2, 12544, 196, 32))  # B, N, M, d
CONVOLUTIONS = ((8, 384, 14, 9), (4, 128, 28, 5), (1, 64, 56, 9))  # B, C, side, kernel


def mixes() -> dict[str, Callable[..., torch.Tensor]]:
    return {
        "ours": gaussian_mix,
        "plain": definition,
        "checkpoint": lambda *tensors: checkpoint(definition, *tensors, use_reentrant=False),
    }


def mix_tensors(batch: int, n: int, m: int, d: int) -> list[torch.Tensor]:
    sizes = ((n, d), (m, d), (n, d), (m, m))
    return [torch.randn(batch, *size) * scale for size, scale in zip(sizes, (0.5, 0.5, 1, 1), strict=True)]


def convolutions() -> dict[str, Callable[..., torch.Tensor]]:
    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    return {"ours": depthwise_conv2d, "plain": plain}


def convolution_tensors(batch: int, channels: int, side: int, size: int) -> list[torch.Tensor]:
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    return [x, torch.randn(channels, 1, size, size)]


def measure(
    functions: dict[str, Callable[..., torch.Tensor]], tensors: list[torch.Tensor], rounds: int, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Of each function by name: milliseconds, MiB, and how many times the time of "ours" it takes."""
    leaves = nn.ParameterList(tensors)
    with torch.no_grad():
        cotangent = torch.ones_like(functions["ours"](*leaves))

    def train(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        out = function(*leaves)
        out.backward(cotangent)
        return out

    runs = {name: partial(train, function) for name, function in functions.items()}
    peaks = {name: peak_bytes(run, leaves, "cpu", accumulating=True) / 2**20 for name, run in runs.items()}
    times = timed(runs, leaves.zero_grad, "cpu", rounds, seconds)
    ratios = {name: statistics.median(y / x for x, y in zip(times["ours"], times[name], strict=True)) for name in runs}
    return {name: (statistics.median(times[name]) * 1e3, peaks[name], ratios[name]) for name in runs}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 7,
    seconds: Annotated[float, typer.Option(help="Stop a case after so long, but not before three rounds.")] = 20.0,
    quick: Annotated[bool, typer.Option(help="The smallest case of each.")] = False,
) -> None:
    """Measure on one CPU thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=120)
    cases = (("mix", mixes, mix_tensors, MIXES), ("convolution", convolutions, convolution_tensors, CONVOLUTIONS))
    for title, functions, tensors, sizes in cases:
        table = Table(title=f"{title}: ms, MiB, time over ours")
        for name in ("sizes", *functions()):
            table.add_column(name, justify="right")
        for size in sizes[:1] if quick else sizes:
            found = measure(functions(), tensors(*size), rounds, seconds)
            table.add_row(str(size), *(f"{ms:.2f} {mib:.1f} {ratio:.2f}x" for ms, mib, ratio in found.values()))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
