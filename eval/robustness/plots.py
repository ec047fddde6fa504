"""Errors per corruption and per severity as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(
    rows: Sequence[Mapping[str, Any]], path: Path, ylabel: str = "top-1 error, %", clean: str | None = "1 - clean"
) -> None:
    """Draw two panels: bars per corruption, whiskers from the lowest to the highest seed; and the means per severity.

    Args:
        rows: For every arm "arm", and the shares "by_corruption", "by_severity" and "clean".
        path: Of the PNG.
        ylabel: What is drawn.
        clean: How "clean" becomes what is drawn: "1 - clean", "clean" as it is, None to leave it out.
    """
    names, severities = list(rows[0]["by_corruption"]), list(rows[0]["by_severity"])
    height = 0.8 / len(rows)
    size = (12, max(4.5, 1.2 + len(names) * (0.24 + 0.1 * len(rows))))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), layout="constrained")
    for number, row in enumerate(rows):
        color = f"C{number}"
        spreads = [row["by_corruption"][name] for name in names]
        places = [place + (number - (len(rows) - 1) / 2) * height for place in range(len(names))]
        means = [100 * each["mean"] for each in spreads]
        left.barh(places, means, height, color=color, label=row["arm"], xerr=_whiskers(spreads))
        points, lows, highs = [], [], []
        if clean is not None and row["clean"]:
            points = [_clean(row["clean"]["mean"], clean)]
            values = [_clean(value, clean) for value in row["clean"]["values"]]
            lows, highs = [min(values)], [max(values)]
        for severity in severities:
            values = [100 * value for value in row["by_severity"][severity]["values"]]
            points.append(100 * row["by_severity"][severity]["mean"])
            lows.append(min(values))
            highs.append(max(values))
        ticks = ([0] if len(points) > len(severities) else []) + [int(severity) for severity in severities]
        right.plot(ticks, points, marker="o", markersize=4, linewidth=1.4, color=color, label=row["arm"])
        right.fill_between(ticks, lows, highs, color=color, alpha=0.2)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.invert_yaxis()
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel(f"{ylabel}, mean over severities")
    left.grid(axis="x", alpha=0.25)
    left.set_axisbelow(True)
    right.set_xticks(ticks, ["clean" if tick == 0 else str(tick) for tick in ticks])
    right.set_xlabel("severity")
    right.set_ylabel(f"{ylabel}, mean over corruptions")
    right.grid(alpha=0.25)
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _whiskers(spreads: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    """Distances from the mean to the lowest and to the highest value, in %; None for one value."""
    if spreads[0]["deviation"] is None:
        return None
    return [
        [100 * (each["mean"] - min(each["values"])) for each in spreads],
        [100 * (max(each["values"]) - each["mean"]) for each in spreads],
    ]


def _clean(value: float, how: str) -> float:
    return 100 * (1 - value) if how == "1 - clean" else 100 * value
