"""Runs of arms as a table with means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.tables import Table

Row = Mapping[str, Any]
COLUMNS = {  # name of a figure: head, scale and digits
    "top1_before": ("top-1 %\nat start", 100, 1),
    "top1": ("top-1 %", 100, 1),
    "top5": ("top-5 %", 100, 1),
    "loss": ("test\nloss", 1, 3),
    "images_per_second": ("training\nimages/s", 1, 0),
}


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One record per arm, from a record per arm and seed: every figure's mean, deviation and values."""
    rows = []
    for name in dict.fromkeys(run["arm"] for run in runs):
        records = [run for run in runs if run["arm"] == name]
        row = {key: records[0][key] for key in ("arm", "start", "methods", "parameters")}
        row["seeds"] = [record["seed"] for record in records]
        rows.append(row | {figure: spread([record.get(figure) for record in records]) for figure in COLUMNS})
    return rows


def table(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> Table:
    """The table for people; columns that nobody has anything in are left out."""
    shown = [name for name in COLUMNS if any(row[name] for row in rows)]
    starts = ["start"] * any(row["start"] for row in rows)
    head = ["arm", *starts, "methods", "parameters", *(COLUMNS[name][0] for name in shown)]
    found = Table(head, title, notes, left=2 + len(starts))
    for row in rows:
        figures = [cell(row[name], *COLUMNS[name][1:]) for name in shown]
        found.add(row["arm"], *(row[name] for name in starts), row["methods"], f"{row['parameters']:,}", *figures)
    return found


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation of the sample (None for one value) and the values; None where one is missing."""
    if any(value is None for value in values):
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def cell(found: Mapping[str, Any] | None, scale: float = 100, digits: int = 1, values: bool = True) -> str | None:
    """Mean and deviation, and below it every seed's value; the value alone where there is one seed."""
    if found is None:
        return None
    mean = f"{scale * found['mean']:.{digits}f}"
    if found["deviation"] is None:
        return mean
    each = " ".join(f"{scale * value:.{digits}f}" for value in found["values"])
    return f"{mean} ± {scale * found['deviation']:.{max(digits, 2)}f}" + (f"\n({each})" if values else "")
