"""What token-aware average pooling and the attention diversification loss cost.

    python -m eval.tap_adl
    python -m eval.tap_adl --quick --json tap_adl.json

Pooling runs beside the same computation with unfolded neighbourhoods, nine copies of the feature map for each scale, in
train mode, forward and backward, with gradients for the tokens and all weights; outputs and gradients must agree to
1e-5 first. The loss runs as a part of a training step of a ViT of timm (DeiT-small by default), beside the same step
without it, and beside what it replaces: no loss, but attention that is not fused, so that its maps could be taken from
the model. All run in turns in one process; a ratio is the median over the rounds of the ratios within a round. Memory
is counted, see `eval.measure.peak_bytes`.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import vltok
from eval.measure import machine, peak_bytes, timed
from vltok.nn import TokenAwareAveragePooling

MAPS = ((8, 56, 64), (32, 14, 384))  # pictures, side, channels
FASTER, MEMORY, STEP = 5.0, 0.25, 1.25  # goals


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        what: What was compared.
        milliseconds: Medians by name; for orientation, they hold for this machine at this hour only.
        ratio: How many times the first takes as long as the second; below 1 is in favour of vltok.
        memory: The same for peak memory, or None where it was not asked for.
    """

    what: str
    milliseconds: dict[str, float]
    ratio: float
    memory: float | None = None


class UnfoldedPooling(nn.Module):
    """The same pooling with every neighbourhood unfolded."""

    def __init__(self, pooling: TokenAwareAveragePooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooling, side = self.pooling, round(x.shape[1] ** 0.5)
        maps = x.mT.unflatten(2, (side, side)).contiguous()
        weights = (pooling.proj(maps) / pooling.temperature).softmax(1)
        out = weights[:, :1] * maps
        for scale in range(1, pooling.num_scales):
            near = F.unfold(maps, 3, dilation=scale, padding=scale).view(*maps.shape[:2], 9, side, side)
            out = out + weights[:, scale : scale + 1] * near.mean(2)
        return out.flatten(2).mT


def train(module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    out = module(x)
    out.backward(cotangent)
    return out


def build_pooling(channels: int) -> tuple[TokenAwareAveragePooling, UnfoldedPooling]:
    """Both formulations with the same weights."""
    torch.manual_seed(0)
    own = TokenAwareAveragePooling(channels).train()
    return own, UnfoldedPooling(copy.deepcopy(own))


def check_pooling(own: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """Refuse to compare unequal things: outputs and gradients to 1e-5 of the largest."""
    cotangent, sides = torch.randn_like(x), []
    for module in (own, other):
        tokens = x.detach().clone().requires_grad_()
        out = train(module, tokens, cotangent)
        sides.append([out.detach(), tokens.grad, *(weight.grad for weight in module.parameters())])
        module.zero_grad()
    for mine, theirs in zip(*sides, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max()
        if not error <= 1e-5:
            raise RuntimeError(f"the two formulations of pooling differ by {error:.1e}")


def measure_pooling(batch: int, side: int, channels: int, device: str, rounds: int, seconds: float) -> Result:
    own, other = (module.to(device) for module in build_pooling(channels))
    x = torch.randn(batch, side * side, channels, device=device, requires_grad=True)
    check_pooling(own, other, x)
    cotangent = torch.randn_like(x)
    runs = {"vltok": lambda: train(own, x, cotangent), "unfold": lambda: train(other, x, cotangent)}

    def clean() -> None:
        x.grad = None
        own.zero_grad()
        other.zero_grad()

    peaks = []
    for run, module in zip(runs.values(), (own, other), strict=True):
        x.grad = torch.zeros_like(x)
        peaks.append(peak_bytes(run, module, device, accumulating=True))
    clean()
    times = timed(runs, clean, device, rounds, seconds)
    what = f"TAP, {batch} x {side} x {side} x {channels}"
    return _result(what, times, "vltok", "unfold", peaks[0] / peaks[1])


def measure_steps(model: str, batch: int, device: str, rounds: int, seconds: float) -> list[Result]:
    """Measure training steps with and without the loss, and the model in eval mode with the method on and off."""
    torch.manual_seed(0)
    plain = timm.create_model(model, num_classes=1000).to(device)
    with_loss, unfused = copy.deepcopy(plain), copy.deepcopy(plain)
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    x = torch.randn(batch, *plain.default_cfg["input_size"], device=device)
    labels = torch.arange(batch, device=device)
    handle = vltok.apply(with_loss, vltok.ADL())

    def step(module: nn.Module) -> None:
        loss = F.cross_entropy(module(x), labels)
        (loss + handle.loss().to(loss) if module is with_loss else loss).backward()

    @torch.no_grad()
    def look(module: nn.Module) -> None:
        module(x)

    def runs(call: Callable[[nn.Module], None], **modules: nn.Module) -> dict[str, Callable[[], None]]:
        return {name: lambda module=module: call(module) for name, module in modules.items()}

    def clean() -> None:
        for module in (plain, with_loss, unfused):
            module.zero_grad()

    for module in (plain, with_loss, unfused):
        module.train()
    times = timed(runs(step, ADL=with_loss, plain=plain, unfused=unfused), clean, device, rounds, seconds)
    results = [
        _result(f"training step of {model}, batch {batch}: ADL / plain", times, "ADL", "plain"),
        _result(f"training step of {model}, batch {batch}: unfused / plain", times, "unfused", "plain"),
    ]
    for module in (plain, with_loss):
        module.eval()
    times = timed(runs(look, ADL=with_loss, plain=plain), clean, device, rounds, seconds)
    return [*results, _result(f"eval mode of {model}, batch {batch}: ADL / plain", times, "ADL", "plain")]


def _result(what: str, times: dict[str, list[float]], first: str, second: str, memory: float | None = None) -> Result:
    milliseconds = {name: round(statistics.median(times[name]) * 1e3, 3) for name in (first, second)}
    ratio = statistics.median(x / y for x, y in zip(times[first], times[second], strict=True))
    return Result(what, milliseconds, ratio, memory)


def goals(results: Sequence[Result]) -> list[str]:
    """What was to be reached, and whether it was."""
    lines = []
    for r in results:
        if r.what.startswith("TAP"):
            is_met = 1 / r.ratio >= FASTER and r.memory <= MEMORY
            text = f"{r.what}: >= {FASTER:g}x with <= 1/4 of the memory; {1 / r.ratio:.1f}x, {r.memory:.2f}"
        elif r.what.startswith("training") and r.what.endswith("ADL / plain"):
            text, is_met = f"{r.what} <= {STEP}; {r.ratio:.3f}", r.ratio <= STEP
        else:
            continue
        lines.append(f"{text}: {'met' if is_met else 'NOT MET'}")
    return lines


def show(results: Sequence[Result], about: dict[str, Any]) -> None:
    """Print the table, and which goals were met."""
    console = Console(width=120)
    table = Table(title="ratios, below 1 are in favour of the first")
    for name in ("what", "ms", "time", "memory"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for r in results:
        took = " / ".join(f"{value:.1f}" for value in r.milliseconds.values())
        table.add_row(r.what, took, f"{r.ratio:.3f}", "" if r.memory is None else f"{r.memory:.3f}")
    console.print(table)
    for line in goals(results):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()), highlight=False)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with one, the clock is its own CPU time.")] = 1,
    model: Annotated[str, typer.Option(help="A ViT of timm, for the training steps.")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a training step.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 5,
    seconds: Annotated[float, typer.Option(help="Stop a case after so long, but not before three rounds.")] = 120.0,
    quick: Annotated[bool, typer.Option(help="Pooling alone: half a minute.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Measure what TAP and ADL cost."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}", param_hint="--device")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports missing GPUs as errors otherwise
    torch.backends.cudnn.allow_tf32 = False  # both formulations in full float32, so that they can agree
    torch.set_num_threads(threads)
    results = [
        measure_pooling(*shape, device, rounds, seconds)
        for shape in track(MAPS, "pooling", console=Console(stderr=True), transient=True)
    ]
    if not quick:
        results += measure_steps(model, batch, device, rounds, seconds)
    about = machine(device)
    show(results, about)
    if json_path is not None:
        content = {"machine": about, "results": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
