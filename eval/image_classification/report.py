"""The runs of all arms as one table, as JSON, and as a picture of accuracy against steps."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

import vltok
from eval.image_classification.arms import Arm
from eval.image_classification.records import write_json

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by name of the arm, a record per seed


def summarise(arms: Sequence[Arm], runs: Runs) -> list[dict[str, Any]]:
    """One flat record per arm: mean, standard deviation (of the sample, None for one seed) and every seed's value."""
    rows = []
    for arm in arms:
        records = runs[arm.name]
        row: dict[str, Any] = {"arm": arm.name, "start": arm.start, "methods": " + ".join(map(describe, arm.methods))}
        row |= {"seeds": [record["seed"] for record in records], "parameters": records[0]["parameters"]}
        for name in ("top1", "top5", "loss", "images_per_second"):
            values = [record[name] for record in records if name in record]
            row[name] = spread(values) if len(values) == len(records) else None
        untrained = [record["curve"][0]["top1"] for record in records if record.get("curve") and arm.start]
        row["top1_before"] = spread(untrained) if untrained else None
        rows.append(row)
    return rows


def render(rows: Sequence[Mapping[str, Any]], title: str, caption: str = "") -> Table:
    """The table for people; columns that nobody has anything in are left out."""
    table = Table(title=title, caption=caption or None)
    table.add_column("arm", no_wrap=True)
    shown = {"top1_before": "top-1 %\nat start", "top1": "top-1 %", "top5": "top-5 %", "loss": "test\nloss"}
    shown = {name: head for name, head in shown.items() if any(row[name] for row in rows)}
    is_timed = any(row["images_per_second"] for row in rows)
    has_starts = any(row["start"] for row in rows)
    for head in (["start"] if has_starts else []) + ["methods"]:
        table.add_column(head, overflow="fold")
    for head in ["parameters", *shown.values(), *(["training\nimages/s"] if is_timed else [])]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [row["arm"]] + ([row["start"] or "-"] if has_starts else [])
        cells += [row["methods"] or "-", f"{row['parameters']:,}"]
        cells += [cell(row[name], 1 if name == "loss" else 100, 3 if name == "loss" else 1) for name in shown]
        cells += [f"{row['images_per_second']['mean']:.0f}" if row["images_per_second"] else "-"] if is_timed else []
        table.add_row(*cells)
    return table


def write(path: Path, rows: Sequence[Mapping[str, Any]], runs: Runs) -> None:
    """Write the table, and every run with its settings and curve."""
    write_json(path, {"arms": list(rows), "runs": [run for name in runs for run in runs[name]]})


def plot(arms: Sequence[Arm], runs: Runs, path: Path) -> None:
    """Draw test accuracy against steps: the mean over seeds, and the range between the lowest and the highest."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm in arms:
        curves = [record["curve"] for record in runs[arm.name]]
        steps = [point["step"] for point in curves[0]]
        values = [[100 * point["top1"] for point in points] for points in zip(*curves, strict=True)]
        mean = [statistics.fmean(value) for value in values]
        (line,) = axis.plot(steps, mean, marker="o", markersize=3, linewidth=1.4, label=arm.name)
        axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.2)
    axis.set_xlabel("training steps")
    axis.set_ylabel("test top-1, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def cell(spread: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    """Mean and deviation, and below it every seed's value; the value alone where there is one seed."""
    if spread is None:
        return "-"
    mean = f"{scale * spread['mean']:.{digits}f}"
    if spread["deviation"] is None:
        return mean
    values = " ".join(f"{scale * value:.{digits}f}" for value in spread["values"])
    return f"{mean} ± {scale * spread['deviation']:.{max(digits, 2)}f}\n({values})"


def describe(method: vltok.Method) -> str:
    """The method and what of its settings is not the default."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    changed = {field.name: values[field.name] for field in fields(method) if values[field.name] != field.default}
    return f"{method.name}({', '.join(f'{name}={value}' for name, value in changed.items())})"
