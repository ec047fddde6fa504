"""What TokenPackerProjector costs beside the matrix products it can't do without, and how much memory it takes.

    python -m eval.projector
    python -m eval.projector --quick --json projector.json

Three things run in turns in one process with the same weights: the projector, the plain formulation with
torch.nn.MultiheadAttention over permuted regions, and the bare products of the linear layers. A ratio is the median
over the rounds of the ratios within a round. Before anything is timed, outputs and gradients must agree to 1e-6 in
float64. Memory is counted, see `eval.measure.peak_bytes`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from eval import options
from eval.measure import check_equal, forward, machine, milliseconds, peak_bytes, ratio, timed, train
from eval.tables import Table, show
from vltok.nn import TokenPackerProjector

TO_PRODUCTS, TO_PLAIN, TO_PLAIN_BYTES = 1.1, 1.0, 2 / 3  # goals
MEMORY_BATCH = 8  # the goal for memory is set from so many images on
PASSES = ("forward", "forward+backward")


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


class Product(NamedTuple):
    """A linear layer's product, and whether its backward pass needs the gradient to its input."""

    rows: int
    width_in: int
    width_out: int
    input_grad: bool = True


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
        out = train(module, features, cotangent=cotangent)
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        # what shifts all scores of a region alike has a gradient of zero, and what stands there is rounding
        grads["clip_attn.in_proj_bias"] = grads["clip_attn.in_proj_bias"].unflatten(0, (3, -1))[[0, 2]]
        del grads["ln_k_1.bias"]
        sides.append({"the output": out.detach(), "the output under no_grad": forward(module, features), **grads})
        module.zero_grad()
    check_equal(*sides, 1e-6, "the projector and the plain formulation")


def measure(
    pair: tuple[nn.Module, PlainProjector], batch: int, dtype: str, device: str, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One case, forward alone and with backward, where features take no gradient; ratios below 1 favour the projector.

    "time" is a ratio to the bare products of the "released" formulation, to the fewer of the projector's "own", and to
    the "plain" formulation; "memory" to that alone, with gradients "fresh", or there before and "accumulating".
    """
    own, plain = (module.to(device, options.DTYPES[dtype]) for module in pair)
    sizes, like = plain.sizes, {"device": device, "dtype": options.DTYPES[dtype]}
    bare = {
        name: BareProducts(products(sizes, batch, plain.scale, name == "released"), like["dtype"], device)
        for name in ("released", "own")
    }
    features = torch.randn(batch, sizes.grid**2, sizes.levels * sizes.dim).to(**like)
    cotangent = torch.randn_like(forward(plain, features))
    results = []
    for what in PASSES:
        call = forward if what == "forward" else partial(train, cotangent=cotangent)
        runs = {"projector": partial(call, own, features), "plain": partial(call, plain, features)}
        peaks = {
            name: [peak_bytes(run, run.args[0], device, name == "accumulating") for run in runs.values()]
            for name in ("fresh", "accumulating")
        }
        runs |= {name: side.forward if what == "forward" else side.train for name, side in bare.items()}
        times = timed(runs, lambda: (own.zero_grad(), plain.zero_grad()), device, rounds, seconds)
        results.append(
            {
                "batch": batch,
                "scale": plain.scale,
                "dtype": dtype,
                "what": what,
                "milliseconds": milliseconds(times),
                "time": {name: ratio(times["projector"], times[name]) for name in (*bare, "plain")},
                "mebibytes": peaks["fresh"][0] / 2**20,
                "memory": {name: mine / theirs for name, (mine, theirs) in peaks.items()},
            }
        )
    return results


def goals(results: Sequence[dict[str, Any]]) -> list[str]:
    """What was to be reached, in how many cases it was, and the worst of them."""
    large = [r for r in results if r["batch"] >= MEMORY_BATCH]
    asked = [
        ("time / released products", TO_PRODUCTS, [r["time"]["released"] for r in results]),
        ("time / own products", TO_PRODUCTS, [r["time"]["own"] for r in results]),
        ("time / MultiheadAttention", TO_PLAIN, [r["time"]["plain"] for r in results]),
        ("memory / MultiheadAttention", TO_PLAIN_BYTES, [r["memory"]["fresh"] for r in large]),
        ("memory / MultiheadAttention, accumulating", TO_PLAIN_BYTES, [r["memory"]["accumulating"] for r in large]),
    ]
    return [
        f"{name} <= {goal:.2f}: {'met' if max(values) <= goal else 'NOT MET'}, in {sum(v <= goal for v in values)} of "
        f"{len(values)} cases; the worst {max(values):.3f}"
        for name, goal, values in asked
        if values
    ]


def table(results: Sequence[dict[str, Any]]) -> Table:
    heads = ("s", "B", "dtype", "what", "ms", "/ released", "/ own", "/ MHA", "MiB", "MiB / MHA", "accumulating")
    found = Table(heads, "TokenPackerProjector: ratios, below 1 are in its favour", goals(results))
    for r in results:
        times, memory = ([f"{value:.2f}" for value in r[name].values()] for name in ("time", "memory"))
        took, most = f"{r['milliseconds']['projector']:.1f}", f"{r['mebibytes']:.1f}"
        found.add(r["scale"], r["batch"], r["dtype"], r["what"], took, *times, most, *memory)
    return found


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ("device", "threads", "dtypes", "rounds", "seconds", "quick", "json")
    shared = options.common(*names, dtypes="float32,bfloat16", quick="only s = 2 in float32, three rounds")
    command = options.parser(__doc__, shared)
    command.add_argument("--scales", type=_scales, default="2,3,4", help="sides of a region (%(default)s)")
    command.add_argument("--batches", type=options.numbers, default="1,8", help="images at a time (%(default)s)")
    return options.parse(command, argv, {"dtypes": "float32", "scales": "2", "rounds": 3})


def _scales(text: str) -> list[int]:
    if unfit := [scale for scale in options.numbers(text) if OFFICIAL.grid % scale]:
        raise argparse.ArgumentTypeError(f"must divide the grid of {OFFICIAL.grid}, got {unfit}")
    return options.numbers(text)


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    results: list[dict[str, Any]] = []
    for scale, dtype in itertools.product(asked.scales, asked.dtypes):
        own, plain = (module.to(asked.device) for module in build(OFFICIAL, scale))
        check(own, plain, asked.device)
        for batch in asked.batches:
            results += measure((own, plain), batch, dtype, asked.device, asked.rounds, asked.seconds)
    show([table(results)], machine(asked.device), asked.json, {"sizes": asdict(OFFICIAL), "results": results})


if __name__ == "__main__":
    main()
