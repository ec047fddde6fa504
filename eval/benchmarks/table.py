"""Results as tables for people, as JSON and as CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.results import MEAN, Record
from eval.tables import Table, write_json


def percent(share: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share as "93.4", or with its interval as "93.4 (91-95)"; "-" where there is none."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}" + ("" if low is None or high is None else f" ({100 * low:.0f}-{100 * high:.0f})")


def render(records: Sequence[Record], notes: Sequence[str]) -> Table:
    """A row for each method and budget: scores, below them the share of the unpruned score, and what it costs."""
    tasks = [task for task in dict.fromkeys(record["task"] for record in records) if task != MEAN]
    first = {task: next(record for record in records if record["task"] == task) for task in tasks}
    names = [f"{task}{'' if first[task]['higher_is_better'] else ' (less is better)'}" for task in tasks]
    table = Table(
        ["method", "keep %", *names, "mean, % of\nunpruned", "visual\ntokens", "tokens\n/layer", "KV MiB"],
        title="Score, and below it % of the unpruned score (95 % interval over samples)",
        left=1,
    )
    before = None
    for method, ratio, own in _rows(records):
        if before not in (None, ratio):
            table.section()
        before = ratio
        cells = [f"{_score(own[task]['score'])}\n{_share(own[task])}" for task in tasks]
        mean = own[MEAN]
        table.add(
            method,
            None if ratio is None else f"{100 * ratio:g}",
            *cells,
            _share(mean),
            f"{mean['kept_tokens']:.0f}",
            f"{mean['tokens_per_layer']:.0f}",
            f"{mean['kv_bytes'] / 2**20:.3g}",
        )
    asked = ", ".join(f"{task} {first[task]['samples']} ({first[task]['metric']})" for task in tasks)
    table.notes = [
        f"Samples and metric: {asked}. Scores are in lmms-eval's units.",
        "Visual tokens: at the entry of the language model. Tokens per layer: mean over the decoder's layers, text "
        "included. KV: cache after the prompt. All are means over samples, then over tasks.",
        *notes,
    ]
    return table


def render_hard(records: Sequence[Mapping[str, Any]]) -> Table:
    """The share of hard samples that are right, with their number, for each method and budget."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    table = Table(
        ["method", "keep %", *tasks],
        title="Hard samples (right at full size, wrong when resized to the same cost): % right, of how many",
        notes=["Resized images get none of them by definition, the unpruned model gets all."],
    )
    before = None
    for method, ratio, own in _rows(records):
        if before not in (None, ratio):
            table.section()
        before = ratio
        cells = [None if task not in own else f"{percent(own[task]['right'])} of {own[task]['hard']}" for task in tasks]
        table.add(method, f"{100 * ratio:g}", *cells)
    asked = {record["task"]: record["samples"] for record in records}
    table.notes = [*table.notes, f"Samples in all: {', '.join(f'{task} {count}' for task, count in asked.items())}."]
    return table


def write(
    folder: Path, name: str, content: Mapping[str, Any], records: Sequence[Record], tables: Sequence[Table]
) -> None:
    """Write NAME.json, NAME.csv (the records), and NAME.md (the tables, to paste)."""
    write_json(folder / f"{name}.json", {**content, "results": list(records)})
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    (folder / f"{name}.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def _rows(records: Sequence[Record]) -> list[tuple[str, float | None, dict[str, Record]]]:
    """Method, budget, and records by task, in the order they stand in."""
    found: dict[tuple[str, float | None], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record["method"], record["keep_ratio"]), {})[record["task"]] = record
    return [(*key, own) for key, own in found.items()]


def _share(record: Record) -> str:
    return percent(record["share"], record["low"], record["high"])


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.1f}"
