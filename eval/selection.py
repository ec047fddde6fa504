"""How long picking tokens takes, as ratios to the matrix products that it can't do without.

    python -m eval.selection
    python -m eval.selection --methods
    python -m eval.selection --device cuda --json selection.json

Every number is the ratio of two medians measured in turns in one process, on one CPU thread unless told otherwise. On
one CPU thread the clock is that thread's own CPU time, so that other programs on the machine don't count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vltok
from eval.measure import machine
from vltok.methods.pruning.divprune import select_max_min
from vltok.methods.pruning.todre import select_diverse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """B images of N tokens of D numbers, k of which are kept."""

    images: int
    length: int
    width: int
    keep: int


@dataclass(frozen=True)
class Result:
    """Ratios of one case; below 1 the first is faster.

    Attributes:
        case: The sizes.
        dtype: Of the tokens.
        milliseconds: Medians by name; for orientation, they hold for this machine at this hour only.
        to_gram: select_diverse to one Gram product X X^T at the tokens' dtype.
        to_rows: select_diverse to k matrix-vector products at the tokens' dtype.
        to_cheaper: The larger of the two, select_diverse to the cheaper product.
        to_published: select_diverse to the published max-min formulation.
        divprune_to_published: DivPrune's picks, which both compute, here and in the published formulation.
    """

    case: Case
    dtype: str
    milliseconds: dict[str, float]
    to_gram: float
    to_rows: float
    to_cheaper: float
    to_published: float
    divprune_to_published: float


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
    own_time = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    left = list(functions)
    while left:
        for name in left:
            wait()
            start = clock()
            functions[name]()
            wait()
            times[name].append(clock() - start)
        left = [name for name in left if sum(times[name]) < seconds and len(times[name]) < 60]
    return {name: statistics.median(taken[1:] or taken) * 1e3 for name, taken in times.items()}


def tokens_of(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random tokens with what visual tokens have: a common direction and unequal norms."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.images, case.length, case.width)
    tokens = torch.randn(shape, generator=generator) + 0.5 * torch.randn(1, 1, case.width, generator=generator)
    return (tokens * torch.rand(*shape[:2], 1, generator=generator).add(0.5)).to(device, dtype)


def measure(case: Case, dtype: str, device: str, seconds: float) -> Result:
    """Measure one case."""
    tokens = tokens_of(case, DTYPES[dtype], device)
    pivot = torch.zeros(case.images, dtype=torch.int64, device=device)
    functions = {
        "select_diverse": lambda: select_diverse(tokens, case.keep, pivot),
        "gram": lambda: [x @ x.T for x in tokens],
        "rows": lambda: [torch.mv(x, x[i]) for x in tokens for i in range(case.keep)],
        "divprune": lambda: select_max_min(tokens, case.keep),
        "published": lambda: [published_max_min(x, case.keep) for x in tokens],
    }
    took = medians(functions, device, seconds)
    ours = took["select_diverse"]
    return Result(
        case=case,
        dtype=dtype,
        milliseconds={name: round(value, 3) for name, value in took.items()},
        to_gram=ours / took["gram"],
        to_rows=ours / took["rows"],
        to_cheaper=ours / min(took["gram"], took["rows"]),
        to_published=ours / took["published"],
        divprune_to_published=took["divprune"] / took["published"],
    )


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


def show_methods(results: dict[Case, dict[str, float]], about: dict[str, Any]) -> None:
    """Print how long each selector takes beside ToDRE's first stage."""
    console = Console(width=130)
    table = Table(title="Time of each selector as a ratio to ToDRE's first stage, float32")
    table.add_column("selector")
    for case in results:
        table.add_column(f"B {case.images}, N {case.length}, D {case.width}, k {case.keep}", justify="right")
    for name in SELECTORS:
        table.add_row(name, *(f"{took[name] / took['ToDRE']:.2f}" for took in results.values()))
    console.print(table)
    console.print("ToDRE's milliseconds: " + ", ".join(f"{took['ToDRE']:.1f}" for took in results.values()))
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()))


def cases(quick: bool) -> list[Case]:
    """The sizes: LLaVA-1.5 (576 tokens) and LLaVA-NeXT (2880), small and 7B-wide, at 25, 10 and 5 % and 8 tokens."""
    if quick:
        return [Case(1, 576, 1024, 58), Case(8, 576, 1024, 58), Case(1, 2880, 4096, 288)]
    sizes = [(length, width) for length in (576, 2880) for width in (1024, 4096)]
    alone = [Case(1, n, d, k) for n, d in sizes for k in (8, round(0.05 * n), round(0.1 * n), n // 4)]
    batches = [Case(8, n, d, round(0.1 * n)) for n, d in sizes[:3]] + [Case(8, n, d, 8) for n, d in sizes[:3]]
    return [Case(1, 256, 256, 13), Case(1, 256, 256, 64), *alone, *batches]


def show(results: list[Result], about: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=130)
    table = Table(title="select_diverse, max-sum (time ratios: below 1 it is the faster one)")
    for name in (
        "B",
        "N",
        "D",
        "k",
        "dtype",
        "ms",
        "/ Gram",
        "/ k rows",
        "/ cheaper",
        "/ published",
        "DivPrune / published",
    ):
        table.add_column(name, justify="right")
    for r in results:
        sizes = [str(value) for value in asdict(r.case).values()]
        ratios = (r.to_gram, r.to_rows, r.to_cheaper, r.to_published, r.divprune_to_published)
        took = f"{r.milliseconds['select_diverse']:.2f}"
        table.add_row(*sizes, r.dtype, took, *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)

    speed = Table(title="bfloat16 tokens: how many times as fast as the same tokens in float32")
    for name in ("B", "N", "D", "k", "times"):
        speed.add_column(name, justify="right")
    by_case: dict[Case, dict[str, float]] = {}
    for r in results:
        by_case.setdefault(r.case, {})[r.dtype] = r.milliseconds["select_diverse"]
    for case, took in by_case.items():
        speed.add_row(*(str(value) for value in asdict(case).values()), f"{took['float32'] / took['bfloat16']:.2f}")
    console.print(speed)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()))


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    seconds: Annotated[float, typer.Option(help="time for each function in each case")] = 1.5,
    quick: Annotated[bool, typer.Option(help="three sizes only")] = False,
    methods: Annotated[bool, typer.Option("--methods", help="every selector beside ToDRE's first stage")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything to this file")] = None,
) -> None:
    """Measure select_diverse and DivPrune against matrix products and the published max-min formulation."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device}")
    torch.set_num_threads(threads)
    about = machine(device)
    if methods:
        sizes = [Case(1, 576, 4096, 64), Case(1, 2880, 4096, 320)]
        sizes += [] if quick else [Case(8, 576, 4096, 64), Case(8, 2880, 4096, 320)]
        took = {case: measure_methods(case, device, seconds) for case in track(sizes, "measuring", transient=True)}
        show_methods(took, about)
        if json_path is not None:
            rows = [{**asdict(case), "milliseconds": own} for case, own in took.items()]
            json_path.write_text(json.dumps({"machine": about, "methods": rows}, indent=1) + "\n")
        return
    work = [(case, dtype) for case in cases(quick) for dtype in DTYPES]
    results = [measure(case, dtype, device, seconds) for case, dtype in track(work, "measuring", transient=True)]
    show(results, about)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
