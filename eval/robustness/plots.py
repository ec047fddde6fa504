"""Errors per corruption and per severity as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(
    rows: Sequence[Mapping[str, Any]], path: Path, ylabel: str = "top-1 error, %", clean: str = "1 - clean"
) -> None:
    """Draw means per corruption and per severity, with lines from the lowest to the highest seed.

    Args:
        rows: For every arm "arm", and spreads of shares in "by_corruption", "by_severity" and "clean".
        path: Of the PNG.
        ylabel: What is drawn.
        clean: How "clean" becomes what is drawn: "1 - clean", or "clean" as it is.
    """
    names, severities = list(rows[0]["by_corruption"]), list(rows[0]["by_severity"])
    size = (11, max(4.0, 1.4 + len(names) * (0.2 + 0.08 * len(rows))))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), layout="constrained")
    has_clean = all(row["clean"] for row in rows)
    ticks = [0] * has_clean + [int(severity) for severity in severities]
    for number, row in enumerate(rows):
        shift = number - (len(rows) - 1) / 2  # arms side by side, so that none hides another
        style = {"color": f"C{number}", "marker": "o", "markersize": 4.5, "label": row["arm"]}
        means, ranges = _percent([row["by_corruption"][name] for name in names])
        places = [place + 0.7 * shift / len(rows) for place in range(len(names))]
        left.errorbar(means, places, xerr=ranges, linestyle="", elinewidth=1.6, **style)
        spreads = [row["by_severity"][severity] for severity in severities]
        if has_clean:
            values = [1 - value if clean == "1 - clean" else value for value in row["clean"]["values"]]
            spreads.insert(0, {"mean": sum(values) / len(values), "values": values})
        means, ranges = _percent(spreads)
        places = [tick + 0.16 * shift / len(rows) for tick in ticks]
        right.errorbar(places, means, yerr=ranges, linewidth=1.2, elinewidth=1.6, **style)
    for place in range(0, len(names), 2):
        left.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    left.set_xlabel(f"{ylabel}, mean over severities")
    left.grid(axis="x", alpha=0.3)
    right.set_xticks(ticks, ["clean" if tick == 0 else str(tick) for tick in ticks])
    right.set_xlabel("severity")
    right.set_ylabel(f"{ylabel}, mean over corruptions")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _percent(spreads: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Means in %, and their distances from the lowest and to the highest value."""
    means = [100 * each["mean"] for each in spreads]
    lows = [mean - 100 * min(each["values"]) for mean, each in zip(means, spreads, strict=True)]
    highs = [100 * max(each["values"]) - mean for mean, each in zip(means, spreads, strict=True)]
    return means, [[max(0.0, low) for low in lows], [max(0.0, high) for high in highs]]  # rounding can go below 0
