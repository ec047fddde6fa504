"""A picture for each task: the score over the tokens that a decoder layer works on, for all methods."""

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from eval.benchmarks.plan import FLOORS, SMALL, UNPRUNED
from eval.benchmarks.results import MEAN, Record

GREYS = ("#222222", "#666666", "#999999", "#bbbbbb")  # for the floors
COLOURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is grey
MARKERS = "osDPXvphd*<>^"


def plot_tasks(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw TASK.png for every task, and mean.png with the mean share of the unpruned score; returns the files."""
    paths = []
    for task in dict.fromkeys(record["task"] for record in records):
        own = [record for record in records if record["task"] == task]
        if any(record["share"] is not None for record in own):
            paths.append(_plot(own, task, folder / f"{re.sub('[^A-Za-z0-9._-]+', '-', task)}.png"))
    return paths


def _plot(records: Sequence[Record], task: str, path: Path) -> Path:
    plain = next(record for record in records if record["method"] == UNPRUNED)
    unit = 1.0 if task == MEAN else plain["score"]
    pruned = [record for record in records if record is not plain]
    names = list(dict.fromkeys(record["method"] for record in pruned))
    figure, axis = plt.subplots(figsize=(9, 0.22 * max(18, len(names) + 3)), layout="constrained")
    axis.axhline(unit, color="black", linestyle="--", linewidth=1, label=UNPRUNED)
    greys, colours = iter(GREYS), cycle(COLOURS)
    for number, name in enumerate(names):
        points = [record for record in pruned if record["method"] == name and record["share"] is not None]
        points.sort(key=lambda record: record["tokens_per_layer"])
        shares = [point["share"] for point in points]
        below = [0 if p["low"] is None else unit * max(0, p["share"] - p["low"]) for p in points]
        above = [0 if p["high"] is None else unit * max(0, p["high"] - p["share"]) for p in points]
        is_floor = name in (SMALL, *FLOORS)
        beside = 1.006 ** (number - (len(names) - 1) / 2)  # methods of equal cost stand side by side
        axis.errorbar(
            [point["tokens_per_layer"] * beside for point in points],
            [unit * share for share in shares],
            yerr=[below, above],
            label=name,
            color=next(greys) if is_floor else next(colours),
            linestyle=":" if is_floor else ("-", "--", "-.")[number // len(COLOURS) % 3],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(_ticks([record["tokens_per_layer"] for record in pruned])))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"tokens per decoder layer, text included (unpruned: {plain['tokens_per_layer']:.0f})")
    less = "" if plain["higher_is_better"] else ", less is better"
    axis.set_ylabel("mean share of the unpruned score" if task == MEAN else f"{plain['metric']}{less}")
    axis.set_title(
        "mean over tasks, 95 % intervals"
        if task == MEAN
        else f"{task}, {plain['samples']} samples, 95 % intervals of the share"
    )
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _ticks(values: Sequence[float]) -> list[int]:
    """Whole numbers near the values, none so near to another that their labels would touch."""
    ticks: list[int] = []
    for value in sorted(values):
        if not ticks or value > 1.12 * ticks[-1]:
            ticks.append(round(value))
    return ticks
