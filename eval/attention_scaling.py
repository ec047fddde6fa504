"""How time and memory of attention grow with the number of tokens: softmax beside SOFT, and SOFT as it was released.

    python -m eval.attention_scaling
    python -m eval.attention_scaling --quick --json scaling.json --plot scaling.png
    python -m eval.attention_scaling --kernels

Whole attention layers, projections included, run in turns in one process on square grids: softmax attention by
torch.nn.functional.scaled_dot_product_attention ("sdpa"); SoftmaxFreeAttention with a constant number of landmarks, 49
or 64, for which its cost is linear ("SOFT"), and with the ratio of 8 that the papers use in their largest stage, for
which landmarks grow with the tokens ("SOFT, ratio 8"); and what the released code computes, written plainly, with whole
kernel matrices and squared norms by products with ones ("released", ratio 8). A ratio is the median over the rounds of
the ratios within a round. Exponents are fitted by least squares to logarithms, from 1,024 tokens on. Before anything
is timed, SOFT in parity mode and the released formulation must agree to 1e-6 in outputs and gradients, in float64.

With --kernels SOFT's two hand-written backward passes run beside autograd's instead. "mix" is
`vltok.kernels.gaussian_mix`: tile by tile ("ours"), by whole kernel matrices ("plain"), and these computed a second
time rather than held ("checkpoint"). "convolution" is `vltok.kernels.depthwise` beside torch's own. A hand-written
pass is kept where it takes 10 % less time or 20 % less memory.

Memory is the peak above weights, inputs and gradients, and counted, not sampled; see `eval.measure.peak_bytes`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eval import options
from eval.measure import (
    check_equal,
    forward,
    machine,
    milliseconds,
    peak_bytes,
    ratio,
    results_of,
    side_by_side,
    timed,
    train,
    verdict,
)
from eval.tables import Table, show
from vltok.kernels.depthwise import depthwise_conv2d
from vltok.kernels.gaussian_mix import definition, gaussian_mix
from vltok.nn import SoftmaxFreeAttention

SIDES, QUICK_SIDES = "14,28,32,40,56,64,80,96,112,128", "14,32,56,64"
FIT_FROM = 1024  # tokens
RELEASED_AT = (56, 112)  # sides at which the released formulation is a goal
RATIO, CONV_SIZE = 8, 9  # of the papers' largest stage
STEPS = 20  # of Newton's iteration
CONSTANT, GROWING = "SOFT", "SOFT, ratio 8"
PASSES = ("forward", "forward+backward")
MIXES = ((2, 196, 49, 32), (24, 576, 49, 64), (2, 3136, 49, 32), (2, 12544, 49, 32), (2, 12544, 196, 32))  # B, N, M, d
CONVOLUTIONS = ((8, 384, 14, 9), (4, 128, 28, 5), (1, 64, 56, 9))  # B, C, side, kernel
Result = dict[str, Any]


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
    for name, own in ratios.items():
        if own <= side:
            layers[name] = attention = SoftmaxFreeAttention(
                dim, heads, own, CONV_SIZE, normalize=normalize, parity=parity
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


def check(dim: int, heads: int, normalize: bool, device: str) -> None:
    """Refuse to compare unequal things: SOFT as released and the released formulation, outputs and gradients."""
    side = 32
    layers = build(side, dim, heads, normalize, parity=True)
    x = torch.randn(2, side * side, dim, device=device, dtype=torch.float64)
    like, grid = torch.randn_like(x), (side, side)
    own, released = (results_of(layers[name].to(x), x, grid, cotangent=like) for name in (GROWING, "released"))
    released = {name.removeprefix("attention."): value for name, value in released.items()}
    check_equal(own, released, 1e-6, "SOFT and the released formulation")


def measure(
    side: int, batch: int, dim: int, heads: int, normalize: bool, device: str, rounds: int, seconds: float
) -> list[Result]:
    """One grid, forward under no_grad, and forward and backward, where the input takes a gradient too.

    "mebibytes" are peaks above weights, inputs and gradients; "to_sdpa" and "to_released" say how many times faster
    than these each is.
    """
    layers = {name: layer.to(device) for name, layer in build(side, dim, heads, normalize).items()}
    x = torch.randn(batch, side * side, dim, device=device, requires_grad=True)
    how = {"device": device, "rounds": rounds, "seconds": seconds}
    results = []
    for what in PASSES:
        times, peaks = side_by_side(layers, x, (side, side), trains=what != "forward", **how)
        to = {
            f"to_{other}": {name: ratio(times[other], times[name]) for name in times if name != other}
            for other in ("sdpa", "released")
        }
        sizes = {"tokens": side * side, "what": what}
        results.append({**sizes, "milliseconds": milliseconds(times), "mebibytes": peaks, **to})
    return results


def exponent(points: Iterable[tuple[int, float]]) -> float:
    """e of the power law that fits best, value = c * tokens^e; NaN for fewer than two points."""
    logs = [(math.log(tokens), math.log(value)) for tokens, value in points if tokens >= FIT_FROM]
    return float(np.polyfit(*zip(*logs, strict=True), 1)[0]) if len(logs) > 1 else math.nan


def exponents(results: Sequence[Result], what: str) -> dict[str, tuple[float, float]]:
    """Exponents of time and memory by name."""
    chosen = [r for r in results if r["what"] == what]
    return {
        name: tuple(exponent((r["tokens"], r[kind][name]) for r in chosen) for kind in ("milliseconds", "mebibytes"))
        for name in chosen[0]["milliseconds"]
    }


def crossover(results: Sequence[Result], what: str, name: str) -> int | None:
    """The number of tokens from which on a layer is faster than sdpa, at all sizes measured; None if there is none."""
    found = None
    for r in sorted((r for r in results if r["what"] == what), key=lambda r: -r["tokens"]):
        if r["to_sdpa"][name] <= 1:
            break
        found = r["tokens"]
    return found


def goals(results: Sequence[Result]) -> list[str]:
    """What was to be reached, and whether it was."""
    lines: list[str] = []
    for what in PASSES:
        time, memory = exponents(results, what)[CONSTANT]
        if not math.isnan(time):
            text = f"{what}: exponents of SOFT <= 1.1; time {time:.2f}, memory {memory:.2f}"
            lines.append(verdict(text, max(time, memory) <= 1.1))
        start = crossover(results, what, CONSTANT)
        is_early = start is not None and start <= 4096
        lines.append(verdict(f"{what}: SOFT is faster than sdpa from some N <= 4096 on; {start}", is_early))
        for r in results:
            if r["what"] == what and r["tokens"] == 16384:
                times = r["to_sdpa"][CONSTANT]
                lines.append(verdict(f"{what}: 4x sdpa at 16384; {times:.1f}x", times >= 4))
    for r in results:
        if r["what"] == PASSES[1] and math.isqrt(r["tokens"]) in RELEASED_AT:
            times, share = r["to_released"][GROWING], r["mebibytes"][GROWING] / r["mebibytes"]["released"]
            text = f"{r['what']} at {r['tokens']}: >= 2x the released formulation with <= 1/2 of its memory"
            lines.append(verdict(f"{text}; {times:.2f}x, {share:.2f}", times >= 2 and share <= 0.5))
    return lines


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each kind of pass, with the exponents below."""
    found = []
    for what in PASSES:
        chosen, fitted = [r for r in results if r["what"] == what], exponents(results, what)
        table = Table(("N", *fitted), f"{what}: ms and MiB; x: times faster than sdpa", left=0)
        for r in chosen:
            faster = {name: f" {times:.2f}x" for name, times in r["to_sdpa"].items()}
            cells = (f"{r['milliseconds'][n]:.1f} ms {r['mebibytes'][n]:.1f} MiB{faster.get(n, '')}" for n in fitted)
            table.add(r["tokens"], *cells)
        table.section()
        table.add("exponent", *(f"{time:.2f} time, {memory:.2f} memory" for time, memory in fitted.values()))
        found.append(table)
    found[-1].notes = goals(results)
    return found


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw time and memory against the number of tokens, with fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for column, what in zip(panels.T, PASSES, strict=True):
        chosen, fitted = [r for r in results if r["what"] == what], exponents(results, what)
        tokens = [r["tokens"] for r in chosen]
        for row, (panel, kind) in enumerate(zip(column, ("milliseconds", "mebibytes"), strict=True)):
            for name in fitted:
                values = [r[kind][name] for r in chosen]
                panel.loglog(tokens, values, marker="o", markersize=4, label=f"{name}: N^{fitted[name][row]:.2f}")
            panel.set_ylabel(("time, ms", "peak memory, MiB")[row])
            panel.grid(alpha=0.3, which="both")
            panel.legend()
        column[0].set_title(what)
        column[1].set_xlabel("tokens N")
        column[1].set_xticks(tokens, [str(n) for n in tokens], rotation=45)
        column[1].minorticks_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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


def measure_kernels(
    functions: dict[str, Callable[..., torch.Tensor]], tensors: list[torch.Tensor], rounds: int, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Of each function by name: milliseconds, MiB, and how many times the time of "ours" it takes."""
    leaves = nn.ParameterList(tensors)
    cotangent = torch.ones_like(forward(functions["ours"], *leaves))
    runs = {name: partial(train, function, *leaves, cotangent=cotangent) for name, function in functions.items()}
    peaks = {name: peak_bytes(run, leaves, "cpu", accumulating=True) / 2**20 for name, run in runs.items()}
    times = timed(runs, leaves.zero_grad, "cpu", rounds, seconds)
    took = milliseconds(times)
    return {name: (took[name], peaks[name], ratio(times[name], times["ours"])) for name in runs}


def kernel_tables(quick: bool, rounds: int, seconds: float) -> list[Table]:
    """Measure the kernels on the CPU."""
    torch.manual_seed(0)
    found = []
    cases = (("mix", mixes, mix_tensors, MIXES), ("convolution", convolutions, convolution_tensors, CONVOLUTIONS))
    for title, functions, tensors, sizes in cases:
        table = Table(("sizes", *functions()), f"{title}: ms, MiB, time over ours")
        for size in sizes[:1] if quick else sizes:
            took = measure_kernels(functions(), tensors(*size), rounds, seconds)
            table.add(size, *(f"{ms:.2f} {mib:.1f} {times:.2f}x" for ms, mib, times in took.values()))
        found.append(table)
    return found


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ("device", "threads", "rounds", "seconds", "quick", "json")
    quick = "four grids, three rounds: half a minute; the smallest case of each kernel"
    command = options.parser(__doc__, options.common(*names, seconds=30.0, quick=quick))
    command.add_argument("--sides", type=options.numbers, default=SIDES, help="of the square grids (%(default)s)")
    command.add_argument("--dim", type=options.count, default=64, help="width (%(default)s)")
    command.add_argument("--heads", type=options.count, default=2, help="attention heads (%(default)s)")
    command.add_argument("--batch", type=options.count, default=1, help="pictures at a time (%(default)s)")
    flag = argparse.BooleanOptionalAction
    command.add_argument("--normalize", action=flag, default=True, help="SOFT-Norm rather than SOFT")
    command.add_argument("--kernels", action="store_true", help="the hand-written backward passes instead, on the CPU")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw curves into this file (.png, .svg)")
    asked = options.parse(command, argv, {"sides": QUICK_SIDES, "rounds": 3})
    if asked.dim % asked.heads:
        command.error(f"--heads must divide the width {asked.dim}, got {asked.heads}")
    if min(asked.sides) < RATIO:
        command.error(f"--sides must be at least {RATIO}, the ratio; got {min(asked.sides)}")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    if asked.kernels:
        found = kernel_tables(asked.quick, asked.rounds, asked.seconds)
        rows = [
            {"kernel": t.title.partition(":")[0], **dict(zip(t.head, row, strict=True))}
            for t in found
            for row in t.rows
        ]
        show(found, machine("cpu"), asked.json, {"kernels": rows})
        return
    sizes = (asked.dim, asked.heads, asked.normalize)
    check(*sizes, asked.device)
    results: list[Result] = []
    for side in sorted({*asked.sides}):
        results += measure(side, asked.batch, *sizes, asked.device, asked.rounds, asked.seconds)
    settings = {name: getattr(asked, name) for name in ("dim", "heads", "batch", "normalize")}
    show(tables(results), machine(asked.device), asked.json, {"settings": settings, "results": results})
    if asked.plot is not None:
        plot(results, asked.plot)


if __name__ == "__main__":
    main()
