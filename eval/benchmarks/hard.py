"""The VTC filter: samples that need the image's detail, as smaller images of equal cost get them wrong.

After VTC-Bench, https://arxiv.org/abs/2510.07143: a sample is hard at a budget if the model is right on the full image,
and wrong on one that is resized to the same number of visual tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.plan import Row
from eval.benchmarks.results import Cell, Cells

RIGHT = 0.5  # a sample worth so much is right: scores of some tasks are shares of people who agree


def hard_samples(full: Cell, small: Cell) -> set[str] | None:
    """Numbers of the samples that are right at full size and wrong when resized; None where samples have no worth."""
    if full.values is None or small.values is None:
        return None
    return {key for key, value in full.values.items() if value >= RIGHT > small.values[key]}


def hard_records(rows: Mapping[Row, Cells], columns: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One record for every row with a budget and every column: the share of its hard samples that are right.

    Args:
        rows: The unpruned model first, and smaller images at every budget; budgets without these have no records.
        columns: Names of columns, each with its tasks, whose samples are taken together.

    Returns:
        "method", "keep_ratio", "task"; "hard" and "samples", how many samples are hard and how many there are; "right",
        a share, None where none is hard. Columns whose samples have no worth of their own are left out.
    """
    plain = next(iter(rows.values()))
    small = {row.keep_ratio: cells for row, cells in rows.items() if row.shrinks}
    records = []
    for row, cells in rows.items():
        if row.keep_ratio not in small:
            continue
        for column, tasks in columns.items():
            chosen = {task: hard_samples(plain[task], small[row.keep_ratio][task]) for task in tasks}
            if None in chosen.values() or any(cells[task].values is None for task in tasks):
                continue
            right = [cells[task].values[key] >= RIGHT for task, keys in chosen.items() for key in sorted(keys)]
            records.append(
                {
                    "method": row.name,
                    "keep_ratio": row.keep_ratio,
                    "task": column,
                    "hard": len(right),
                    "samples": sum(plain[task].samples for task in tasks),
                    "right": sum(right) / len(right) if right else None,
                }
            )
    return records
