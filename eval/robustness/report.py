"""The results of all arms as tables and as JSON; `plots.py` draws them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.image_classification.arms import Arm
from eval.image_classification.records import write_json
from eval.image_classification.report import cell, describe, spread
from eval.robustness.bench import Results
from eval.robustness.scores import corruption_scores, flip_score

Row = dict[str, Any]


def summarise(arms: Sequence[Arm], results: Results) -> list[Row]:
    """One record per arm: of every score the mean, the standard deviation over seeds and every seed's value.

    "clean" and every subset are top-1 accuracies; "errors" has the top-1 error by corruption and severity,
    "by_corruption" and "by_severity" its means; "mean_error" and "mce" see `corruption_scores`, "mfr" `flip_score`.
    What was not measured is None or missing.
    """
    return [_summarise(arm, results[arm.name]) for arm in arms]


def _summarise(arm: Arm, records: Sequence[Mapping[str, Any]]) -> Row:
    cells = [record["cells"] for record in records]
    names = list(cells[0])
    errors = [_errors(each) for each in cells]
    flips = [
        {name.removeprefix("flips/"): each[name]["flip_rate"] for name in names if name.startswith("flips/")}
        for each in cells
    ]
    scores = [corruption_scores(each) for each in errors]
    first = errors[0]
    severities = sorted({severity for by_severity in first.values() for severity in by_severity})
    return {
        "arm": arm.name,
        "methods": " + ".join(map(describe, arm.methods)),
        "seeds": [record["seed"] for record in records],
        "parameters": records[0]["parameters"],
        "clean": _spread([each["clean"]["top1"] if "clean" in each else None for each in cells]),
        "mean_error": _spread([each["mean_error"] for each in scores]),
        "mce": _spread([each["mce"] for each in scores]),
        "by_corruption": {name: _spread([_mean(each[name].values()) for each in errors]) for name in first},
        "by_severity": {
            str(severity): _spread([_mean(by[severity] for by in each.values()) for each in errors])
            for severity in severities
        },
        "errors": {
            name: {str(severity): _spread([each[name][severity] for each in errors]) for severity in first[name]}
            for name in first
        },
        "subsets": {
            name.removeprefix("subset/"): _spread([each[name]["top1"] for each in cells])
            for name in names
            if name.startswith("subset/")
        },
        "flip_rates": {name: _spread([each[name] for each in flips]) for name in flips[0]},
        "mfr": _spread([flip_score(each) for each in flips]),
        "skipped": {name: each["skipped"] for name, each in cells[0].items() if each["skipped"]},
    }


def render(rows: Sequence[Row], title: str) -> Table:
    """The scores of all arms; columns that nobody has anything in are left out."""
    heads = {
        "clean": "clean\ntop-1 %",
        "mean_error": "mean corruption\nerror %",
        "mce": "mCE\n(AlexNet = 100)",
        "mfr": "mFR\n(AlexNet = 100)",
    }
    shown = [name for name in heads if any(row[name] for row in rows)]
    table = Table(title=title)
    table.add_column("arm", no_wrap=True)
    for head in ("methods", "parameters", *(heads[name] for name in shown if name != "mfr")):
        table.add_column(head, justify="left" if head == "methods" else "right", overflow="fold")
    subsets = list(rows[0]["subsets"])
    for head in [f"{name}\ntop-1 %" for name in subsets] + [heads[name] for name in shown if name == "mfr"]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [row["arm"], row["methods"] or "-", f"{row['parameters']:,}"]
        cells += [cell(row[name], 100, 1) for name in shown if name != "mfr"]
        cells += [cell(row["subsets"][name], 100, 1) for name in subsets]
        table.add_row(*cells, *(cell(row[name], 100, 1) for name in shown if name == "mfr"))
    return table


def render_errors(rows: Sequence[Row], title: str = "top-1 error %") -> Table | None:
    """A line per corruption and one per severity, a column per arm, in %; None where nothing was corrupted."""
    if not rows[0]["by_corruption"]:
        return None
    table = _details(rows, title)
    for name in rows[0]["by_corruption"]:
        table.add_row(name.replace("_", " "), *(_one_line(row["by_corruption"][name]) for row in rows))
    table.add_section()
    for name in rows[0]["by_severity"]:
        table.add_row(f"severity {name}", *(_one_line(row["by_severity"][name]) for row in rows))
    return table


def render_flips(rows: Sequence[Row]) -> Table | None:
    """A line per perturbation, a column per arm, in %; None where there are none."""
    if not rows[0]["flip_rates"]:
        return None
    table = _details(rows, "changed answers %")
    for name in rows[0]["flip_rates"]:
        table.add_row(name.replace("_", " "), *(_one_line(row["flip_rates"][name]) for row in rows))
    return table


def write(path: Path, rows: Sequence[Row], results: Results) -> None:
    """Write the tables, and every record with its settings and cells."""
    write_json(path, {"arms": list(rows), "runs": [record for records in results.values() for record in records]})


def _errors(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Top-1 errors by corruption and severity."""
    errors: dict[str, dict[int, float]] = {}
    for name, figures in cells.items():
        if name.startswith("corruption/"):
            _, corruption, severity = name.split("/")
            errors.setdefault(corruption, {})[int(severity)] = 1 - figures["top1"]
    return errors


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    return None if any(value is None for value in values) else spread(values)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _one_line(values: Mapping[str, Any]) -> str:
    deviation = values["deviation"]
    return f"{100 * values['mean']:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _details(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["arm"], justify="right")
    return table
