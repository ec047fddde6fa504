"""How long picking tokens takes, as ratios to the matrix products that it can't do without.

    python -m eval.selection
    python -m eval.selection --methods
    python -m eval.selection --device cuda --json selection.json

ToDRE's `select_diverse` runs beside one Gram product X X^T and beside k products of X with one of its rows, both at the
tokens' dtype, and beside the published max-min formulation; DivPrune, too, runs beside that. With `--methods` every
selector runs beside ToDRE's first stage. Every number is the ratio of two medians measured in turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vltok
from eval import options
from eval.measure import clock_of, machine
from eval.tables import Table, show
from vltok.methods.pruning.divprune import select_max_min
from vltok.methods.pruning.todre import select_diverse


@dataclass(frozen=True)
class Case:
    """B images of N tokens of D numbers, k of which are kept."""

    images: int
    length: int
    width: int
    keep: int


def published_max_min(tokens: torch.Tensor, num_keep: int) -> torch.Tensor:
    """DivPrune as released: all in the tokens' dtype, and every step takes the minimum over all picked rows anew."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks = torch.empty(num_keep, dtype=torch.int64, device=tokens.device)
    for step in range(num_keep):
        if step == 0:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        else:
            nearest = distance.index_select(0, picks[:step]).amin(0)
        picks[step] = nearest.argmax()
    return picks


def medians(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, float]:
    """Run functions in turns, each until it has used up its seconds or ran 60 times; median milliseconds of each.

    The first run of a function only warms up, unless it alone used up the time.
    """
    clock = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    left = list(functions)
    while left:
        for name in left:
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
        left = [name for name in left if sum(times[name]) < seconds and len(times[name]) < 60]
    return {name: statistics.median(taken[1:] or taken) * 1e3 for name, taken in times.items()}


def tokens_of(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random tokens with what visual tokens have: a common direction and unequal norms."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.images, case.length, case.width)
    tokens = torch.randn(shape, generator=generator) + 0.5 * torch.randn(1, 1, case.width, generator=generator)
    return (tokens * torch.rand(*shape[:2], 1, generator=generator).add(0.5)).to(device, dtype)


def measure(case: Case, dtype: str, device: str, seconds: float) -> dict[str, Any]:
    """One case: milliseconds by name, and ratios, which below 1 are in favour of the first."""
    tokens = tokens_of(case, options.DTYPES[dtype], device)
    pivot = torch.zeros(case.images, dtype=torch.int64, device=device)
    took = medians(
        {
            "select_diverse": lambda: select_diverse(tokens, case.keep, pivot),
            "gram": lambda: [x @ x.T for x in tokens],
            "rows": lambda: [torch.mv(x, x[i]) for x in tokens for i in range(case.keep)],
            "divprune": lambda: select_max_min(tokens, case.keep),
            "published": lambda: [published_max_min(x, case.keep) for x in tokens],
        },
        device,
        seconds,
    )
    ours = took["select_diverse"]
    return {
        "case": asdict(case),
        "dtype": dtype,
        "milliseconds": {name: round(value, 3) for name, value in took.items()},
        "to_gram": ours / took["gram"],
        "to_rows": ours / took["rows"],
        "to_cheaper": ours / min(took["gram"], took["rows"]),
        "to_published": ours / took["published"],
        "divprune_to_published": took["divprune"] / took["published"],
    }


# What `--methods` sets beside ToDRE's first stage: every selector of images, with the settings it comes with.
SELECTORS: dict[str, Callable[[int], vltok.Selector]] = {
    "ToDRE": lambda k: vltok.ToDRE(num_keep=k, stages=(1,)),
    "ToDRE, centred": lambda k: vltok.ToDRE(num_keep=k, stages=(1,), correction="centred"),
    "DivPrune": lambda k: vltok.DivPrune(num_keep=k),
    "DivPrune, merging": lambda k: vltok.DivPrune(num_keep=k, merge="nearest"),
    "DivPrune, 2 x 2 regions": lambda k: vltok.DivPrune(num_keep=k, regions=(2, 2)),
    "FasterVLM": lambda k: vltok.FasterVLM(num_keep=k),
    "VisionZip": lambda k: vltok.VisionZip(num_keep=k),
    "PruMerge+": lambda k: vltok.PruMergePlus(num_keep=k),
    "SCOPE": lambda k: vltok.SCOPE(num_keep=k),
    "VisPruner": lambda k: vltok.VisPruner(num_keep=k),
    "HoloV": lambda k: vltok.HoloV(num_keep=k),
    "CDPruner": lambda k: vltok.CDPruner(num_keep=k),
    "MMTok": lambda k: vltok.MMTok(num_keep=k),
    "DART": lambda k: vltok.DART(num_keep=k),
    "OTPrune": lambda k: vltok.OTPrune(num_keep=k),
    "pool": lambda k: vltok.Pool(num_keep=k),
    "random": lambda k: vltok.RandomTokens(num_keep=k),
    "stride": lambda k: vltok.StrideTokens(num_keep=k),
}
TOWER_WIDTH, HEADS, WORDS = 1024, 16, 12  # of what CLIP-L shows, and of the question


def visual_of(case: Case, device: str) -> vltok.VisualTokens:
    """Random visual tokens with all that a selector may ask for."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.images, case.length)
    height = max(n for n in range(1, case.length + 1) if case.length % n == 0 and n * n <= case.length)
    places = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(height), torch.arange(case.length // height))
    return vltok.VisualTokens(
        embeddings=tokens_of(case, torch.float32, device),
        image_keys=torch.arange(case.images, device=device),
        attention=torch.rand(shape, generator=generator).pow(8).to(device),
        is_overview=torch.ones(shape, dtype=torch.bool, device=device),
        grid=(1, height, case.length // height),
        coordinates=places.to(device).expand(*shape, 3),
        features=tokens_of(Case(*shape, TOWER_WIDTH, case.keep), torch.float32, device),
        can_project=True,
        keys=torch.randn(*shape, TOWER_WIDTH, generator=generator).to(device),
        num_heads=HEADS,
        text=torch.randn(case.images, WORDS, case.width, generator=generator).to(device),
        text_mask=torch.ones(case.images, WORDS, dtype=torch.bool, device=device),
    )


@torch.no_grad()
def measure_methods(case: Case, device: str, seconds: float) -> dict[str, float]:
    """Milliseconds of each selector on one case, in turns."""
    visual = visual_of(case, device)
    methods = {name: make(case.keep) for name, make in SELECTORS.items()}
    counts = {name: method.budget(case.length, visual.grid, "image") for name, method in methods.items()}
    runs = {name: lambda name=name: methods[name].pick(visual, counts[name]) for name in methods}
    return medians(runs, device, seconds)


def cases(quick: bool) -> list[Case]:
    """The sizes: LLaVA-1.5 (576 tokens) and LLaVA-NeXT (2880), small and 7B-wide, at 25, 10 and 5 % and 8 tokens."""
    if quick:
        return [Case(1, 576, 1024, 58), Case(8, 576, 1024, 58), Case(1, 2880, 4096, 288)]
    sizes = [(length, width) for length in (576, 2880) for width in (1024, 4096)]
    alone = [Case(1, n, d, k) for n, d in sizes for k in (8, round(0.05 * n), round(0.1 * n), n // 4)]
    batches = [Case(8, n, d, round(0.1 * n)) for n, d in sizes[:3]] + [Case(8, n, d, 8) for n, d in sizes[:3]]
    return [Case(1, 256, 256, 13), Case(1, 256, 256, 64), *alone, *batches]


def tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Ratios of all cases, and how much faster tokens of fewer bits are."""
    title = "select_diverse, max-sum (time ratios: below 1 it is the faster one)"
    heads = ("/ Gram", "/ k rows", "/ cheaper", "/ published", "DivPrune / published")
    main = Table(("B", "N", "D", "k", "dtype", "ms", *heads), title)
    speed = Table(("B", "N", "D", "k", "times"), "bfloat16 tokens: how many times as fast as the same in float32")
    by_case: dict[tuple, dict[str, float]] = {}
    for each in results:
        sizes, ms = tuple(each["case"].values()), each["milliseconds"]["select_diverse"]
        ratios = [f"{value:.2f}" for name, value in each.items() if "to_" in name]
        main.add(*sizes, each["dtype"], f"{ms:.2f}", *ratios)
        by_case.setdefault(sizes, {})[each["dtype"]] = ms
    for sizes, took in by_case.items():
        if {"float32", "bfloat16"} <= took.keys():
            speed.add(*sizes, f"{took['float32'] / took['bfloat16']:.2f}")
    return [main, speed] if speed.rows else [main]


def methods_table(results: dict[Case, dict[str, float]]) -> Table:
    """How long each selector takes beside ToDRE's first stage."""
    heads = [f"B {case.images}, N {case.length}, D {case.width}, k {case.keep}" for case in results]
    table = Table(("selector", *heads), "Time of each selector as a ratio to ToDRE's first stage, float32")
    for name in SELECTORS:
        table.add(name, *(f"{took[name] / took['ToDRE']:.2f}" for took in results.values()))
    table.notes = ["ToDRE's milliseconds: " + ", ".join(f"{took['ToDRE']:.1f}" for took in results.values())]
    return table


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ("device", "threads", "dtypes", "seconds", "quick", "json")
    defaults = {"dtypes": "float32,bfloat16", "seconds": 1.5, "quick": "fewer sizes"}
    command = options.parser(__doc__, options.common(*names, **defaults))
    command.add_argument("--methods", action="store_true", help="every selector beside ToDRE's first stage, in float32")
    return options.parse(command, argv)


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    about = machine(asked.device)
    if asked.methods:
        sizes = [Case(1, 576, 4096, 64), Case(1, 2880, 4096, 320)]
        sizes += [] if asked.quick else [Case(8, 576, 4096, 64), Case(8, 2880, 4096, 320)]
        took = {case: measure_methods(case, asked.device, asked.seconds) for case in sizes}
        rows = [{**asdict(case), "milliseconds": own} for case, own in took.items()]
        show([methods_table(took)], about, asked.json, {"methods": rows})
        return
    work = [(case, dtype) for case in cases(asked.quick) for dtype in asked.dtypes]
    results = [measure(case, dtype, asked.device, asked.seconds) for case, dtype in work]
    show(tables(results), about, asked.json, {"results": results})


if __name__ == "__main__":
    main()
