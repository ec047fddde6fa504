"""The results of all models as tables, and as the rows that `eval.robustness.plots` draws."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.image_classification.report import cell, spread
from eval.robustness.bench import Results


def summarise(results: Results, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One record per model: mIoU as shares on clean pictures, by group of these, and by corruption and severity.

    `classes` are the names of the classes, by default as each model's folder says.
    "by_corruption" and "by_severity" are means of the cells' mIoU, "corrupted" is the mean over corruptions of the mean
    over severities; None without corruptions.
    """
    return [_summarise(name, records[0], classes) for name, records in results.items()]


def _summarise(name: str, record: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, Any]:
    by: dict[str, dict[str, float]] = {}
    for cell_name, figures in record["cells"].items():
        if cell_name.startswith("corruption/"):
            _, corruption, severity = cell_name.split("/")
            by.setdefault(corruption, {})[severity] = figures["miou"]
    severities = sorted({severity for each in by.values() for severity in each})
    by_corruption = {corruption: _mean(each.values()) for corruption, each in by.items()}
    clean = record["cells"]["clean"]
    return {
        "arm": name,
        "parameters": record["parameters"],
        "clean": _one(clean["miou"]),
        "corrupted": _one(_mean(by_corruption.values())) if by else None,
        "groups": {group: _one(value) for group, value in clean["groups"].items() if value is not None},
        "by_corruption": {corruption: _one(value) for corruption, value in by_corruption.items()},
        "by_severity": {severity: _one(_mean(each[severity] for each in by.values())) for severity in severities},
        "iou": dict(zip(classes or record["classes"], clean["iou"], strict=True)),
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The scores of all models."""
    table = Table(title="mIoU %")
    table.add_column("model", no_wrap=True)
    is_corrupted = rows[0]["corrupted"] is not None
    groups = list(rows[0]["groups"])
    for head in ["parameters", "clean", *groups, *(["corrupted,\nmean"] if is_corrupted else [])]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [row["clean"], *(row["groups"].get(group) for group in groups)]
        cells += [row["corrupted"]] if is_corrupted else []
        table.add_row(row["arm"], f"{row['parameters']:,}", *(cell(each, 100, 1) for each in cells))
    return table


def render_classes(rows: Sequence[Mapping[str, Any]]) -> Table:
    """IoU of every class on clean pictures, a column per model; "-" for a class that is nowhere."""
    table = Table(title="IoU % on clean pictures")
    table.add_column("class", no_wrap=True)
    for row in rows:
        table.add_column(row["arm"], justify="right")
    names = list(dict.fromkeys(name for row in rows for name in row["iou"]))
    for name in names:
        values = [row["iou"].get(name) for row in rows]
        table.add_row(name, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _one(value: float) -> dict[str, Any]:
    return spread([value])


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
