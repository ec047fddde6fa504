"""What methods in a vision tower cost: token-aware pooling (TAP), the diversification loss (ADL), merging (ToMe).

    python -m eval.towers
    python -m eval.towers --quick --json towers.json
    python -m eval.towers --merging --model vit_base_patch16_224 --merges 8,16 --device cuda

Pooling runs beside the same computation with unfolded neighbourhoods, nine copies of the feature map for each scale, in
train mode, forward and backward, with gradients for the tokens and all weights; outputs and gradients must agree to
1e-5 first. The loss runs as a part of a training step of a ViT of timm (DeiT-small by default), beside the same step
without it, and beside what it replaces: no loss, but attention that is not fused, so that its maps could be taken from
the model. With --merging one model in eval mode runs plain and with ToMe at several r instead, that is so many patches
fewer after every block, on noise pictures. All run in turns in one process; a ratio is the median over the rounds of
the ratios within a round. Memory is counted, see `eval.measure.peak_bytes`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

import vltok
from eval import options
from eval.measure import check_equal, machine, milliseconds, ratio, results_of, side_by_side, timed, verdict
from eval.tables import Table, show
from vltok.nn import TokenAwareAveragePooling

MAPS = ((8, 56, 64), (32, 14, 384))  # pictures, side, channels
FASTER, MEMORY, STEP = 5.0, 0.25, 1.25  # goals
Result = dict[str, Any]


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


def build_pooling(channels: int) -> tuple[TokenAwareAveragePooling, UnfoldedPooling]:
    """Both formulations with the same weights."""
    torch.manual_seed(0)
    own = TokenAwareAveragePooling(channels).train()
    return own, UnfoldedPooling(copy.deepcopy(own))


def check_pooling(own: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """Refuse to compare unequal things: outputs and gradients to 1e-5 of the largest."""
    cotangent = torch.randn_like(x)
    sides = [results_of(module, x, cotangent=cotangent) for module in (own, other)]
    theirs = {name.removeprefix("pooling."): value for name, value in sides[1].items()}
    check_equal(sides[0], theirs, 1e-5, "the two formulations of pooling")


def measure_pooling(batch: int, side: int, channels: int, device: str, rounds: int, seconds: float) -> Result:
    """Pooling beside unfolded neighbourhoods: time and memory as ratios."""
    own, other = (module.to(device) for module in build_pooling(channels))
    x = torch.randn(batch, side * side, channels, device=device, requires_grad=True)
    check_pooling(own, other, x)
    how = {"device": device, "rounds": rounds, "seconds": seconds}
    times, peaks = side_by_side({"vltok": own, "unfold": other}, x, trains=True, **how)
    what = f"TAP, {batch} x {side} x {side} x {channels}"
    return _result(what, times, "vltok", "unfold") | {"memory": peaks["vltok"] / peaks["unfold"]}


def measure_steps(model: str, batch: int, device: str, rounds: int, seconds: float) -> list[Result]:
    """Training steps with and without the loss, and the model in eval mode with the method on and off."""
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

    sides = {"ADL": with_loss, "plain": plain, "unfused": unfused}
    times: dict[Callable, dict[str, list[float]]] = {}
    for call in (step, look):
        for module in sides.values():
            module.train(call is step)
        names = list(sides) if call is step else ["ADL", "plain"]
        runs = {name: partial(call, sides[name]) for name in names}
        times[call] = timed(runs, lambda: [m.zero_grad() for m in sides.values()], device, rounds, seconds)
    return [
        _result(f"training step of {model}, batch {batch}: ADL / plain", times[step], "ADL", "plain"),
        _result(f"training step of {model}, batch {batch}: unfused / plain", times[step], "unfused", "plain"),
        _result(f"eval mode of {model}, batch {batch}: ADL / plain", times[look], "ADL", "plain"),
    ]


def _result(what: str, times: Mapping[str, list[float]], first: str, second: str) -> Result:
    """How many times the first takes as long as the second; below 1 is in favour of vltok."""
    chosen = {name: times[name] for name in (first, second)}
    both = {"milliseconds": milliseconds(chosen), "ratio": ratio(times[first], times[second])}
    return {"what": what, **both, "memory": None}


def goals(results: Sequence[Result]) -> list[str]:
    """What was to be reached, and whether it was."""
    lines = []
    for r in results:
        if r["what"].startswith("TAP"):
            is_met = 1 / r["ratio"] >= FASTER and r["memory"] <= MEMORY
            text = f"{r['what']}: >= {FASTER:g}x with <= 1/4 of the memory; {1 / r['ratio']:.1f}x, {r['memory']:.2f}"
        elif r["what"].startswith("training") and r["what"].endswith("ADL / plain"):
            text, is_met = f"{r['what']} <= {STEP}; {r['ratio']:.3f}", r["ratio"] <= STEP
        else:
            continue
        lines.append(verdict(text, is_met))
    return lines


def table(results: Sequence[Result]) -> Table:
    found = Table(("what", "ms", "time", "memory"), "ratios, below 1 are in favour of the first", goals(results))
    for r in results:
        took = " / ".join(f"{value:.1f}" for value in r["milliseconds"].values())
        memory = "" if r["memory"] is None else f"{r['memory']:.3f}"
        found.add(r["what"], took, f"{r['ratio']:.3f}", memory)
    return found


def measure_merging(
    model: str, merges: Sequence[int], batch: int, device: str, rounds: int, seconds: float
) -> list[Result]:
    """The model at every r, the plain one (0) first: patches that leave the last block, and how many times as fast."""
    torch.manual_seed(0)
    plain = timm.create_model(model).eval().to(device)
    x = torch.randn(batch, *plain.default_cfg["input_size"], device=device)
    sides: dict[int, nn.Module] = {0: plain}
    for r in merges:
        sides[r] = copy.deepcopy(plain)
        vltok.apply(sides[r], vltok.ToMe(r=r))
    look = torch.no_grad()(lambda side: side.forward_features(x))
    left = {r: look(side).shape[1] - plain.num_prefix_tokens for r, side in sides.items()}
    times = timed({r: partial(look, side) for r, side in sides.items()}, device=device, rounds=rounds, seconds=seconds)
    return [
        {
            "r": r,
            "patches": left[r],
            "pictures_per_second": 1e3 * batch / milliseconds(times)[r],
            "faster": ratio(times[0], times[r]),
        }
        for r in sides
    ]


def merging_table(results: Sequence[Result], title: str) -> Table:
    found = Table(("r", "patches left", "pictures/s", "times as fast"), title)
    for each in results:
        found.add(each["r"], each["patches"], f"{each['pictures_per_second']:.1f}", f"{each['faster']:.2f}")
    return found


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ("device", "threads", "rounds", "seconds", "quick", "json")
    command = options.parser(__doc__, options.common(*names, seconds=120.0, quick="pooling alone: half a minute"))
    command.add_argument("--model", default="deit_small_patch16_224", help="a ViT of timm (%(default)s)")
    command.add_argument("--batch", type=options.count, help="pictures at a time; 16, with --merging 8")
    command.add_argument("--merging", action="store_true", help="what merging tokens gains, instead")
    command.add_argument("--merges", type=options.numbers, default="4,8,13,16", help="r of ToMe (%(default)s)")
    return options.parse(command, argv)


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    how = (asked.device, asked.rounds, asked.seconds)
    about = machine(asked.device)
    if asked.merging:
        batch = asked.batch or 8
        results = measure_merging(asked.model, asked.merges, batch, *how)
        shown, content = merging_table(results, f"{asked.model}, batch {batch}"), {"model": asked.model}
    else:
        torch.backends.cudnn.allow_tf32 = False  # both formulations in full float32, so that they can agree
        results = [measure_pooling(*shape, *how) for shape in MAPS]
        results += [] if asked.quick else measure_steps(asked.model, asked.batch or 16, *how)
        shown, content = table(results), {}
    show([shown], about, asked.json, {**content, "results": results})


if __name__ == "__main__":
    main()
