"""What TokenPackerProjector costs beside the matrix products it can't do without, and how much memory it takes.

    python -m eval.projector
    python -m eval.projector --quick --json projector.json

Three things run in turns in one process with the same weights: the projector, the plain formulation with
torch.nn.MultiheadAttention over permuted regions, and the bare products of the linear layers. A ratio is the median
over the rounds of the ratios within a round. On one CPU thread the clock is that thread's own CPU time, so that other
programs on the machine don't count. Before anything is timed, outputs and gradients must agree to 1e-6 in float64.

Memory is counted, not sampled: on the CPU from the profiler's record of every allocation, so that it is the same in
every run; on CUDA by torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from eval.measure import machine, numbers, peak_bytes, timed
from vltok.nn import TokenPackerProjector

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TO_PRODUCTS, TO_PLAIN, TO_PLAIN_BYTES = 1.1, 1.0, 2 / 3  # goals
MEMORY_BATCH = 8  # the goal for memory is set from so many images on


@dataclass(frozen=True)
class Sizes:
    """Sizes of the projector; those of the released models by default."""

    grid: int = 24
    dim: int = 1024
    hidden: int = 4096
    levels: int = 4
    embed: int = 1024
    heads: int = 8


OFFICIAL = Sizes()


@dataclass(frozen=True)
class Product:
    """A linear layer's product, and whether its backward pass needs the gradient to its input."""

    rows: int
    width_in: int
    width_out: int
    input_grad: bool = True


@dataclass(frozen=True)
class Result:
    """One case; ratios below 1 are in favour of the projector.

    Attributes:
        batch: Images.
        scale: Side of a region.
        dtype: Of weights and features.
        what: "forward", under no_grad, or "forward+backward", where features take no gradient.
        milliseconds: Medians by name; for orientation, they hold for this machine at this hour only.
        time: Ratios to the bare products of the "released" formulation, to the fewer products of the projector's "own"
            and to the "plain" formulation with torch.nn.MultiheadAttention.
        mebibytes: The projector's peak above weights, inputs and gradients.
        memory: Ratios of that to the plain formulation: gradients "fresh", or there before and "accumulating".
    """

    batch: int
    scale: int
    dtype: str
    what: str
    milliseconds: dict[str, float]
    time: dict[str, float]
    mebibytes: float
    memory: dict[str, float]


class PlainProjector(nn.Module):
    """The published formulation, written plainly: norms, permuted regions, torch.nn.MultiheadAttention.

    Weights that are not asked for let torch.nn.MultiheadAttention take its faster path.
    """

    def __init__(self, sizes: Sizes, scale: int) -> None:
        super().__init__()
        self.sizes, self.scale = sizes, scale
        dim, embed, levels = sizes.dim, sizes.embed, sizes.levels * sizes.dim
        self.q_proj_1 = nn.Linear(dim, embed, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(levels, embed), nn.GELU(), nn.Linear(embed, embed))
        self.v_proj_1 = nn.Sequential(nn.Linear(levels, embed), nn.GELU(), nn.Linear(embed, embed))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(embed, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(embed, sizes.heads)
        self.mlp = nn.Sequential(nn.Linear(embed, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.hidden))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        batch, side = features.shape[0], self.sizes.grid // self.scale
        image = features[..., -self.sizes.dim :].float().mT.unflatten(-1, (self.sizes.grid, self.sizes.grid))
        points = F.interpolate(image, (side, side), mode="bilinear", align_corners=False).flatten(2).mT
        query = self.ln_q_1(self.q_proj_1(points.to(features.dtype))).reshape(1, batch * side * side, -1)
        keys = self.regions(self.ln_k_1(self.k_proj_1(features)))
        values = self.regions(self.ln_v_1(self.v_proj_1(features)))
        return self.mlp(self.clip_attn(query, keys, values, need_weights=False)[0].reshape(batch, side * side, -1))

    def regions(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, E) -> (s * s, B * M, E)."""
        s, side = self.scale, self.sizes.grid // self.scale
        return x.reshape(-1, side, s, side, s, x.shape[-1]).permute(2, 4, 0, 1, 3, 5).reshape(s * s, -1, x.shape[-1])


def products(sizes: Sizes, batch: int, scale: int, released: bool) -> list[Product]:
    """Products of the linear layers: as released, or with the attention's key and value projections on N / s^2 rows."""
    patches, levels, embed, hidden = batch * sizes.grid**2, sizes.levels * sizes.dim, sizes.embed, sizes.hidden
    tokens = patches // scale**2
    branch = [Product(patches, levels, embed, input_grad=False), Product(patches, embed, embed)]
    projected = Product(patches if released else tokens, embed, embed)
    return [
        Product(tokens, sizes.dim, embed, input_grad=False),
        *(2 * branch),
        Product(tokens, embed, embed),
        *(2 * [projected]),
        Product(tokens, embed, embed),
        Product(tokens, embed, hidden),
        Product(tokens, hidden, hidden),
    ]


class BareProducts:
    """Products on random numbers, and nothing else."""

    def __init__(self, layers: Sequence[Product], dtype: torch.dtype, device: str) -> None:
        sides = {(p.rows, width) for p in layers for width in (p.width_in, p.width_out)}
        made = {shape: torch.randn(shape, device=device).to(dtype) for shape in sides}
        weights = [torch.randn(p.width_out, p.width_in, device=device).to(dtype) for p in layers]
        self.operands = [
            (made[p.rows, p.width_in], weight, made[p.rows, p.width_out], p.input_grad)
            for p, weight in zip(layers, weights, strict=True)
        ]

    def forward(self) -> None:
        for x, weight, _, _ in self.operands:
            x @ weight.mT

    def train(self) -> None:
        self.forward()
        for x, weight, grad, input_grad in self.operands:
            grad.mT @ x
            if input_grad:
                grad @ weight


def forward(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(features)


def train(module: nn.Module, features: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    out = module(features)
    out.backward(cotangent)
    return out


def build(sizes: Sizes, scale: int) -> tuple[TokenPackerProjector, PlainProjector]:
    """Both formulations with the same random weights; no weight is a special case, such as a bias of zero."""
    torch.manual_seed(0)
    widths = (sizes.dim, sizes.hidden, scale, sizes.levels, sizes.embed, sizes.heads)
    own, plain = TokenPackerProjector(sizes.grid, *widths), PlainProjector(sizes, scale)
    for parameter in own.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    plain.load_state_dict(own.state_dict())
    return own, plain


def check(own: nn.Module, plain: PlainProjector, device: str) -> None:
    """Refuse to compare unequal things: outputs and all gradients, float64, 2 images, to 1e-6 of the largest.

    In float32 the plain formulation's own rounding is 1e-5 in some gradients; its points are float32 also here.
    """
    sizes = plain.sizes
    own, plain = (copy.deepcopy(module).double() for module in (own, plain))
    features = torch.randn(2, sizes.grid**2, sizes.levels * sizes.dim, device=device, dtype=torch.float64)
    cotangent = torch.randn_like(forward(plain, features))
    sides = []
    for module in (own, plain):
        out = train(module, features, cotangent)
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        # what shifts all scores of a region alike has a gradient of zero, and what stands there is rounding
        grads["clip_attn.in_proj_bias"] = grads["clip_attn.in_proj_bias"].unflatten(0, (3, -1))[[0, 2]]
        del grads["ln_k_1.bias"]
        sides.append({"the output": out.detach(), "the output under no_grad": forward(module, features), **grads})
        module.zero_grad()
    for name, expected in sides[1].items():
        error = (sides[0][name] - expected).abs().max() / expected.abs().max()
        if not error <= 1e-6:
            raise RuntimeError(f"the projector and the plain formulation differ by {error:.1e} in {name}")


def measure(
    pair: tuple[nn.Module, PlainProjector], batch: int, dtype: str, device: str, rounds: int, seconds: float
) -> list[Result]:
    """Measure one case, forward alone and forward and backward."""
    own, plain = (module.to(device, DTYPES[dtype]) for module in pair)
    sizes, scale = plain.sizes, plain.scale
    layers = {name: products(sizes, batch, scale, name == "released") for name in ("released", "own")}
    bare = {name: BareProducts(wanted, DTYPES[dtype], device) for name, wanted in layers.items()}
    features = torch.randn(batch, sizes.grid**2, sizes.levels * sizes.dim, device=device).to(DTYPES[dtype])
    cotangent = torch.randn_like(forward(plain, features))
    results = []
    for what in ("forward", "forward+backward"):
        call = forward if what == "forward" else partial(train, cotangent=cotangent)
        runs = {"projector": partial(call, own, features), "plain": partial(call, plain, features)}
        peaks = {
            "fresh": [peak_bytes(run, run.args[0], device, False) for run in runs.values()],
            "accumulating": [peak_bytes(run, run.args[0], device, True) for run in runs.values()],
        }
        runs |= {name: side.forward if what == "forward" else side.train for name, side in bare.items()}
        times = timed(runs, lambda: (own.zero_grad(), plain.zero_grad()), device, rounds, seconds)
        ours = times["projector"]
        ratios = {name: [x / y for x, y in zip(ours, times[name], strict=True)] for name in (*bare, "plain")}
        results.append(
            Result(
                batch,
                scale,
                dtype,
                what,
                milliseconds={name: round(statistics.median(taken) * 1e3, 3) for name, taken in times.items()},
                time={name: statistics.median(values) for name, values in ratios.items()},
                mebibytes=peaks["fresh"][0] / 2**20,
                memory={name: mine / theirs for name, (mine, theirs) in peaks.items()},
            )
        )
    return results


def goals(results: Sequence[Result]) -> list[str]:
    """What was to be reached, in how many cases it was, and the worst of them."""
    large = [r for r in results if r.batch >= MEMORY_BATCH]
    asked = [
        ("time / released products", TO_PRODUCTS, [r.time["released"] for r in results]),
        ("time / own products", TO_PRODUCTS, [r.time["own"] for r in results]),
        ("time / MultiheadAttention", TO_PLAIN, [r.time["plain"] for r in results]),
        ("memory / MultiheadAttention", TO_PLAIN_BYTES, [r.memory["fresh"] for r in large]),
        ("memory / MultiheadAttention, accumulating", TO_PLAIN_BYTES, [r.memory["accumulating"] for r in large]),
    ]
    return [
        f"{name} <= {goal:.2f}: {'met' if max(values) <= goal else 'NOT MET'}, in {sum(v <= goal for v in values)} of "
        f"{len(values)} cases; the worst {max(values):.3f}"
        for name, goal, values in asked
        if values
    ]


def show(results: Sequence[Result], about: dict[str, Any]) -> None:
    """Print the table, and which goals were met."""
    console = Console(width=130)
    table = Table(title="TokenPackerProjector: ratios, below 1 are in its favour")
    for name in ("s", "B", "dtype", "what", "ms", "/ released", "/ own", "/ MHA", "MiB", "MiB / MHA", "accumulating"):
        table.add_column(name, justify="right")
    for r in results:
        took = f"{r.milliseconds['projector']:.1f}"
        times, bytes_ = ([f"{value:.2f}" for value in ratios.values()] for ratios in (r.time, r.memory))
        table.add_row(str(r.scale), str(r.batch), r.dtype, r.what, took, *times, f"{r.mebibytes:.1f}", *bytes_)
    console.print(table)
    for line in goals(results):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()), highlight=False)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with one, the clock is its own CPU time.")] = 1,
    dtypes: Annotated[str, typer.Option(help="Any of float32, bfloat16, float16.")] = "float32,bfloat16",
    scales: Annotated[str, typer.Option(help="Sides of a region; each divides the grid.")] = "2,3,4",
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 7,
    seconds: Annotated[float, typer.Option(help="Stop a case after so long, but not before three rounds.")] = 60.0,
    quick: Annotated[bool, typer.Option(help="Only s = 2 in float32, three rounds: two minutes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Measure TokenPackerProjector against bare products and torch.nn.MultiheadAttention."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}", param_hint="--device")
    if quick:
        dtypes, scales, rounds = "float32", "2", 3
    if unknown := [name for name in dtypes.split(",") if name not in DTYPES]:
        raise typer.BadParameter(f"must be of {', '.join(DTYPES)}, got {', '.join(unknown)}", param_hint="--dtypes")
    if unfit := [scale for scale in numbers(scales) if OFFICIAL.grid % scale]:
        raise typer.BadParameter(f"must divide the grid of {OFFICIAL.grid}, got {unfit}", param_hint="--scales")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports missing GPUs as errors otherwise
    torch.set_num_threads(threads)
    images = numbers(batches)
    work = [(scale, dtype) for scale in numbers(scales) for dtype in dtypes.split(",")]
    results: list[Result] = []
    for scale, dtype in track(work, "measuring", console=Console(stderr=True), transient=True):
        own, plain = (module.to(device) for module in build(OFFICIAL, scale))
        check(own, plain, device)
        for batch in images:
            results += measure((own, plain), batch, dtype, device, rounds, seconds)
    about = machine(device)
    show(results, about)
    if json_path is not None:
        content = {"machine": about, "sizes": asdict(OFFICIAL), "results": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
