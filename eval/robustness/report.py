"""The results of all arms as tables, as RobustBench's JSON and as timm's CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.image_classification.report import cell, spread
from eval.robustness.bench import by_corruption
from eval.robustness.scores import corruption_means, mean_corruption_error, mean_flip_rate, severity_means
from eval.tables import Table, write_json

Row = dict[str, Any]
HEADS = {
    "clean": "clean\ntop-1 %",
    "mean_error": "mean corruption\nerror %",
    "mce": "mCE\n(AlexNet = 100)",
    "mfr": "mFR\n(AlexNet = 100)",
}


def scores(cells: Mapping[str, Mapping[str, Any]]) -> Row:
    """What one model's cells say, as shares; None for what was not measured.

    "clean" and "subset NAME" are top-1 accuracies; "errors" are by corruption and severity, "by_corruption" and
    "by_severity" their means, "mean_error" the mean of these.
    """
    flips = {
        name.removeprefix("flips/"): each["flip_rate"] for name, each in cells.items() if name.startswith("flips/")
    }
    hits = by_corruption(cells, "top1")
    errors = {name: {severity: 1 - share for severity, share in each.items()} for name, each in hits.items()}
    means = corruption_means(errors)
    return {
        "clean": cells["clean"]["top1"] if "clean" in cells else None,
        "mean_error": sum(means.values()) / len(means) if means else None,
        "mce": mean_corruption_error(errors),
        "mfr": mean_flip_rate(flips),
        "by_corruption": means,
        "by_severity": severity_means(errors),
        "flip_rates": flips,
        "subsets": {name.removeprefix("subset/"): cells[name]["top1"] for name in cells if name.startswith("subset/")},
        "errors": errors,
    }


def summarise(models: Sequence[Row]) -> list[Row]:
    """One record per arm, from one per model with "arm", "methods", "parameters" and `scores`: spreads over seeds."""
    rows = []
    for name in dict.fromkeys(model["arm"] for model in models):
        found = [model for model in models if model["arm"] == name]
        row = {key: found[0][key] for key in ("arm", "methods", "parameters")}
        row |= {key: spread([model[key] for model in found]) for key in HEADS}
        for key in ("by_corruption", "by_severity", "flip_rates", "subsets"):
            row[key] = {each: spread([model[key][each] for model in found]) for each in found[0][key]}
        rows.append(row)
    return rows


def tables(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> list[Table]:
    """Errors by corruption and severity, changed answers, and the scores; what was not measured is left out."""
    shown = [name for name in HEADS if any(row[name] for row in rows)]
    subsets = list(rows[0]["subsets"])
    head = [*(HEADS[name] for name in shown), *(f"{name}\ntop-1 %" for name in subsets)]
    found = Table(["arm", "methods", "parameters", *head], title, notes, left=2)
    for row in rows:
        figures = [*(row[name] for name in shown), *row["subsets"].values()]
        found.add(row["arm"], row["methods"], f"{row['parameters']:,}", *map(cell, figures))
    flips = details(rows, "changed answers %", ["flip_rates"])
    return [*details(rows, "top-1 error %", ["by_corruption", "by_severity"]), *flips, found]


def details(rows: Sequence[Row], title: str, keys: Iterable[str]) -> list[Table]:
    """A line for each name in the rows' keys, a column per arm, in %; no table where there is none."""
    found = Table(["", *(row["arm"] for row in rows)], title)
    for key in keys:
        if found.rows:
            found.section()
        for name in rows[0][key]:
            words = f"severity {name}" if key == "by_severity" else name.replace("_", " ")
            found.add(words, *(cell(row[key][name], values=False) for row in rows))
    return [found] if any(found.rows) else []


def write_robustbench(folder: Path, models: Sequence[Row], data: str) -> None:
    """Write a file per model with the fields of RobustBench's model_info for common corruptions."""
    for model in models:
        shares = {"clean_acc": model["clean"], "corruptions_mce_2d": model["mce"]}
        shares["corruptions_acc_2d"] = None if model["mean_error"] is None else 1 - model["mean_error"]
        about = {"link": "", "name": model["name"], "authors": "", "additional_data": False, "number_forward_passes": 1}
        about |= {"dataset": data, "venue": "", "architecture": model["architecture"], "eps": None, "reported": ""}
        known = {key: f"{100 * share:.2f}" for key, share in shares.items() if share is not None}
        write_json(folder / f"{model['name']}.json", about | known)


def write_csv(folder: Path, models: Sequence[Row], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results-clean.csv and one for every subset, with the columns of timm's results."""
    names = [name for name in next(iter(results.values())) if name == "clean" or name.startswith("subset/")]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with (folder / f"results-{name.removeprefix('subset/')}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            head = (
                "model",
                "img_size",
                "top1",
                "top1_err",
                "top5",
                "top5_err",
                "param_count",
                "crop_pct",
                "interpolation",
            )
            writer.writerow(head)
            for model in models:
                figures = results[model["name"]][name]
                tops = [100 * figures[top] if top in figures else None for top in ("top1", "top5")]
                pairs = [
                    text for top in tops for text in (("", "") if top is None else (f"{top:.3f}", f"{100 - top:.3f}"))
                ]
                config = model["config"]
                count = f"{model['parameters'] / 1e6:.2f}"
                writer.writerow(
                    [model["name"], config["size"], *pairs, count, config["crop_pct"], config["interpolation"]]
                )
