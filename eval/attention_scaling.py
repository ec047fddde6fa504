"""How time and memory of attention grow with the number of tokens: softmax beside SOFT, and SOFT as it was released.

    python -m eval.attention_scaling
    python -m eval.attention_scaling --quick --json scaling.json --plot scaling.png

Whole attention layers, projections included, run in turns in one process on square grids: softmax attention by
torch.nn.functional.scaled_dot_product_attention ("sdpa"); SoftmaxFreeAttention with a constant number of landmarks, 49
or 64, for which its cost is linear ("SOFT"), and with the ratio of 8 that the papers use in their largest stage, for
which landmarks grow with the tokens ("SOFT, ratio 8"); and what the released code computes, written plainly, with whole
kernel matrices and squared norms by products with ones ("released", ratio 8). A ratio is the median over the rounds of
the ratios within a round. Exponents are fitted by least squares to logarithms, from 1,024 tokens on.

Before anything is timed, SOFT in parity mode and the released formulation must agree to 1e-6 in outputs and gradients,
in float64. Memory is the peak above weights, inputs and gradients, and counted, not sampled; see
`eval.measure.peak_bytes`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from eval.measure import machine, numbers, peak_bytes, timed
from vltok.nn import SoftmaxFreeAttention

SIDES = (14, 28, 32, 40, 56, 64, 80, 96, 112, 128)
QUICK_SIDES = (14, 32, 56, 64)
FIT_FROM = 1024  # tokens
RELEASED_AT = (56, 112)  # sides at which the released formulation is a goal
RATIO, CONV_SIZE = 8, 9  # of the papers' largest stage
STEPS = 20  # of Newton's iteration
CONSTANT, GROWING = "SOFT", "SOFT, ratio 8"
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Result:
    """One number of tokens and one kind of pass.

    Attributes:
        tokens: N.
        what: "forward", under no_grad, or "forward+backward", where the input takes a gradient too.
        milliseconds: Medians by name; for orientation, they hold for this machine at this hour only.
        mebibytes: Peaks by name, above weights, inputs and gradients.
        to_sdpa: How many times faster than sdpa, by name.
        to_released: How many times faster than the released formulation, by name.
    """

    tokens: int
    what: str
    milliseconds: dict[str, float]
    mebibytes: dict[str, float]
    to_sdpa: dict[str, float]
    to_released: dict[str, float]


class SoftmaxAttention(nn.Module):
    """What the blocks of a ViT have."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ReleasedAttention(nn.Module):
    """What the released code computes, with the weights of a `SoftmaxFreeAttention`."""

    def __init__(self, attention: SoftmaxFreeAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        layer, inner = self.attention, self.attention.attn
        batch, length, dim = x.shape
        heads, width = layer.num_heads, dim // layer.num_heads
        query, value = (
            part(x).view(batch, length, heads, width).permute(0, 2, 1, 3) for part in (layer.W_q, layer.W_v)
        )
        query = query / width**0.25
        image = query.permute(0, 1, 3, 2).reshape(batch * heads, width, *grid)
        marks = inner.Qlandmark_op(image).reshape(batch, heads, width, -1).permute(0, 1, 3, 2)
        marks = inner.Qnorm_act(marks)
        near, among = whole_kernel(query, marks), whole_kernel(marks, marks)
        inverse = newton(among, inner.normalize)
        if inner.normalize:
            scale = among.sum(-1) ** -0.5
            inverse = scale[..., :, None] * inverse * scale[..., None, :]
        out = near @ (inverse @ (near.mT @ value))
        values = value.permute(0, 3, 1, 2).reshape(batch * width, heads, *grid)
        convolved = F.conv2d(values, inner.conv.weight, padding=CONV_SIZE // 2, groups=heads)
        convolved = convolved.reshape(batch, width, heads, length).permute(0, 2, 3, 1)
        return layer.ff((out + convolved).permute(0, 2, 1, 3).reshape(batch, length, dim))


def whole_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernel matrix, with squared norms spread over it by products with ones."""
    squares_a = a**2 @ torch.ones_like(b).mT
    squares_b = torch.ones_like(a) @ (b**2).mT
    return torch.exp(-0.5 * (squares_a + squares_b - 2 * (a @ b.mT)))


def newton(kernel: torch.Tensor, normalize: bool) -> torch.Tensor:
    """The inverse as released: with a ridge and the gradient of an inverse, or unrolled, with one start for all."""
    one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    if not normalize:
        return _Newton.apply(kernel + 0.01 * one, kernel.detach())
    start = 2 / kernel.sum(-1).max() ** 2
    for _ in range(9):
        if (one - start * kernel @ kernel).abs().sum(-2).max() <= 1.01:
            break
        start = start / 2
    inverse = start * kernel
    for _ in range(STEPS):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        start = 1.8 / kernel.sum(-1).amax(-1)[..., None, None] ** 2
        inverse = start * matrix
        for _ in range(STEPS):
            inverse = 2 * inverse - inverse @ matrix @ inverse
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ grad @ inverse.mT, None


def constant_ratio(side: int) -> int:
    """The ratio for 7 x 7 or 8 x 8 landmarks."""
    return side // 7 if side % 7 == 0 else side // 8


def build(side: int, dim: int, heads: int, normalize: bool, parity: bool = False) -> dict[str, nn.Module]:
    """The contestants, with random weights."""
    torch.manual_seed(0)
    ratios = {CONSTANT: constant_ratio(side), GROWING: RATIO}
    layers: dict[str, nn.Module] = {"sdpa": SoftmaxAttention(dim, heads)}
    for name, ratio in ratios.items():
        if ratio <= side:
            layers[name] = attention = SoftmaxFreeAttention(
                dim, heads, ratio, CONV_SIZE, normalize=normalize, parity=parity
            )
            draw(attention)
    layers["released"] = ReleasedAttention(SoftmaxFreeAttention(dim, heads, RATIO, CONV_SIZE, normalize))
    layers["released"].attention.load_state_dict(layers[GROWING].state_dict())
    return layers


@torch.no_grad()
def draw(attention: SoftmaxFreeAttention) -> None:
    """Weights at which tokens are near landmarks, so that kernels don't vanish."""
    attention.W_q.weight.mul_(0.5)
    attention.attn.Qlandmark_op.weight.mul_(4)
    attention.attn.Qnorm_act[0].weight.mul_(0.5)


def forward(layer: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    with torch.no_grad():
        return layer(x, grid)


def train(layer: nn.Module, x: torch.Tensor, grid: tuple[int, int], cotangent: torch.Tensor) -> torch.Tensor:
    out = layer(x, grid)
    out.backward(cotangent)
    return out


def check(dim: int, heads: int, normalize: bool, device: str) -> None:
    """Refuse to compare unequal things: SOFT as released and the released formulation, outputs and gradients."""
    side, sides = 32, []
    layers = build(side, dim, heads, normalize, parity=True)
    x = torch.randn(2, side * side, dim, device=device, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    for name in (GROWING, "released"):
        layer, tokens = layers[name].to(x), x.clone().requires_grad_()
        out = train(layer, tokens, (side, side), cotangent)
        weights = {key.removeprefix("attention."): weight.grad for key, weight in layer.named_parameters()}
        sides.append({"the output": out.detach(), "the gradient of the input": tokens.grad, **weights})
    for name, expected in sides[1].items():
        error = (sides[0][name] - expected).abs().max() / expected.abs().max()
        if not error <= 1e-6:
            raise RuntimeError(f"SOFT and the released formulation differ by {error:.1e} in {name}")


def measure(
    side: int, batch: int, dim: int, heads: int, normalize: bool, device: str, rounds: int, seconds: float
) -> list[Result]:
    """Measure one grid, forward alone and forward and backward."""
    layers = {name: layer.to(device) for name, layer in build(side, dim, heads, normalize).items()}
    x = torch.randn(batch, side * side, dim, device=device, requires_grad=True)
    cotangent, grid = torch.randn_like(x), (side, side)

    def clean() -> None:
        x.grad = None
        for layer in layers.values():
            layer.zero_grad()

    results = []
    for what in PASSES:
        call = partial(forward) if what == "forward" else partial(train, cotangent=cotangent)
        runs: dict[str, Callable[[], Any]] = {name: partial(call, layer, x, grid) for name, layer in layers.items()}
        peaks = {}
        for name, run in runs.items():
            x.grad = torch.zeros_like(x)
            peaks[name] = peak_bytes(run, layers[name], device, accumulating=True) / 2**20
        clean()
        times = timed(runs, clean, device, rounds, seconds)
        to = {
            other: {name: speedup(times[name], times[other]) for name in times if name != other}
            for other in ("sdpa", "released")
        }
        milliseconds = {name: round(statistics.median(taken) * 1e3, 3) for name, taken in times.items()}
        results.append(Result(side * side, what, milliseconds, peaks, to["sdpa"], to["released"]))
    return results


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(y / x for x, y in zip(ours, theirs, strict=True))


def exponent(points: Iterable[tuple[int, float]]) -> float:
    """e of the power law that fits best, value = c * tokens^e; NaN for fewer than two points."""
    logs = [(math.log(tokens), math.log(value)) for tokens, value in points if tokens >= FIT_FROM]
    return float(np.polyfit(*zip(*logs, strict=True), 1)[0]) if len(logs) > 1 else math.nan


def exponents(results: Sequence[Result], what: str) -> dict[str, tuple[float, float]]:
    """Exponents of time and memory by name."""
    chosen = [r for r in results if r.what == what]
    return {
        name: (
            exponent((r.tokens, r.milliseconds[name]) for r in chosen),
            exponent((r.tokens, r.mebibytes[name]) for r in chosen),
        )
        for name in chosen[0].milliseconds
    }


def crossover(results: Sequence[Result], what: str, name: str) -> int | None:
    """The number of tokens from which on a layer is faster than sdpa, at all sizes measured; None if there is none."""
    chosen = sorted((r for r in results if r.what == what), key=lambda r: r.tokens)
    found = None
    for r in reversed(chosen):
        if r.to_sdpa[name] <= 1:
            break
        found = r.tokens
    return found


def goals(results: Sequence[Result]) -> list[str]:
    """What was to be reached, and whether it was."""
    lines = []

    def add(text: str, is_met: bool) -> None:
        lines.append(f"{text}: {'met' if is_met else 'NOT MET'}")

    for what in PASSES:
        time, memory = exponents(results, what)[CONSTANT]
        if not math.isnan(time):
            add(f"{what}: exponents of SOFT <= 1.1; time {time:.2f}, memory {memory:.2f}", max(time, memory) <= 1.1)
        start = crossover(results, what, CONSTANT)
        add(f"{what}: SOFT is faster than sdpa from some N <= 4096 on; {start}", start is not None and start <= 4096)
        for r in results:
            if r.what == what and r.tokens == 16384:
                add(f"{what}: 4x sdpa at 16384; {r.to_sdpa[CONSTANT]:.1f}x", r.to_sdpa[CONSTANT] >= 4)
    for r in results:
        if r.what == PASSES[1] and math.isqrt(r.tokens) in RELEASED_AT:
            times, share = r.to_released[GROWING], r.mebibytes[GROWING] / r.mebibytes["released"]
            add(
                f"{r.what} at {r.tokens}: >= 2x the released formulation with <= 1/2 of its memory; "
                f"{times:.2f}x, {share:.2f}",
                times >= 2 and share <= 0.5,
            )
    return lines


def show(results: Sequence[Result], about: dict[str, Any]) -> None:
    """Print the table, the exponents and which goals were met."""
    console = Console(width=150)
    for what in PASSES:
        chosen = [r for r in results if r.what == what]
        names = list(chosen[0].milliseconds)
        table = Table(title=f"{what}: ms and MiB; x: times faster than sdpa")
        table.add_column("N", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        for r in chosen:
            cells = [
                f"{r.milliseconds[name]:.1f} ms {r.mebibytes[name]:.1f} MiB"
                + (f" {r.to_sdpa[name]:.2f}x" if name in r.to_sdpa else "")
                for name in names
            ]
            table.add_row(str(r.tokens), *cells)
        fitted = exponents(results, what)
        table.add_section()
        table.add_row("exponent", *(f"{fitted[name][0]:.2f} time, {fitted[name][1]:.2f} memory" for name in names))
        console.print(table)
    for line in goals(results):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()), highlight=False)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw time and memory against the number of tokens, with fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for column, what in zip(panels.T, PASSES, strict=True):
        chosen, fitted = [r for r in results if r.what == what], exponents(results, what)
        tokens = [r.tokens for r in chosen]
        for row, (panel, label) in enumerate(zip(column, ("time, ms", "peak memory, MiB"), strict=True)):
            for name in chosen[0].milliseconds:
                values = [(r.milliseconds, r.mebibytes)[row][name] for r in chosen]
                panel.loglog(tokens, values, marker="o", markersize=4, label=f"{name}: N^{fitted[name][row]:.2f}")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3, which="both")
            panel.legend()
        column[0].set_title(what)
        column[1].set_xlabel("tokens N")
        column[1].set_xticks(tokens, [str(n) for n in tokens], rotation=45)
        column[1].minorticks_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with one, the clock is its own CPU time.")] = 1,
    sides: Annotated[str, typer.Option(help="Sides of the square grids.")] = ",".join(map(str, SIDES)),
    dim: Annotated[int, typer.Option(min=1, help="Width.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    normalize: Annotated[bool, typer.Option(help="SOFT-Norm rather than SOFT.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 7,
    seconds: Annotated[float, typer.Option(help="Stop a case after so long, but not before three rounds.")] = 30.0,
    quick: Annotated[bool, typer.Option(help="Four grids, three rounds: half a minute.")] = False,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw curves into this file (.png, .svg).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Measure softmax and softmax-free attention against the number of tokens."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}", param_hint="--device")
    if dim % heads:
        raise typer.BadParameter(f"must divide the width {dim}, got {heads}", param_hint="--heads")
    grids = sorted(set(QUICK_SIDES if quick else numbers(sides)))
    if grids[0] < RATIO:
        raise typer.BadParameter(f"must be at least {RATIO}, the ratio; got {grids[0]}", param_hint="--sides")
    rounds = 3 if quick else rounds
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports missing GPUs as errors otherwise
    torch.set_num_threads(threads)
    check(dim, heads, normalize, device)
    results: list[Result] = []
    for side in track(grids, "measuring", console=Console(stderr=True), transient=True):
        results += measure(side, batch, dim, heads, normalize, device, rounds, seconds)
    about = machine(device)
    show(results, about)
    if plot_path is not None:
        plot(results, plot_path)
    if json_path is not None:
        settings = {"dim": dim, "heads": heads, "batch": batch, "normalize": normalize}
        content = {"machine": about, "settings": settings, "results": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
