"""From finished cells to one flat record for every row and task: score, share of the unpruned score, cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.benchmarks.bootstrap import drawn_means, interval, share_draws
from eval.benchmarks.plan import Row

MEAN = "mean"  # the task of the records that stand for all tasks
COSTS = ("visual_tokens", "kept_tokens", "tokens_per_layer", "kv_bytes")
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one row gave on one task of lmms-eval.

    Attributes:
        metric: The figure that is the score.
        score: As lmms-eval gives it.
        higher_is_better: Whether a larger score is better.
        samples: How many there were.
        values: What each is worth, 0..1, by its number; None where that can't be told.
        figures: All figures of the task.
        cost: `COSTS`, each the mean over the samples: visual tokens of the images, those kept at the entry of the
            language model, tokens that a decoder layer works on, text included, bytes of the KV cache after the prompt.
    """

    metric: str
    score: float
    higher_is_better: bool
    samples: int
    values: dict[str, float] | None
    figures: dict[str, float]
    cost: dict[str, float]

    @property
    def mean_value(self) -> float:
        """Mean worth of its samples."""
        return math.fsum(self.values.values()) / len(self.values)


Cells = Mapping[str, Cell]  # of one row, by task


def is_mean(cells: Sequence[Cell]) -> bool:
    """Whether a task's score is a mean over samples, up to the unit: then it is the same multiple in every cell."""
    if any(cell.values is None for cell in cells):
        return False
    units = [cell.score / cell.mean_value for cell in cells if cell.mean_value != 0]
    zeros = [cell.score for cell in cells if cell.mean_value == 0]
    return not any(zeros) and all(math.isclose(unit, units[0], rel_tol=1e-6) for unit in units)


def summarise(rows: Mapping[Row, Cells], columns: Mapping[str, Sequence[str]]) -> list[Record]:
    """One record for every row and column, and one for the mean over columns.

    The share of a column is that of its score, the mean over its tasks. The mean share leaves out columns where a
    smaller score is better.

    Args:
        rows: The unpruned model first; each has a cell for every task.
        columns: Names of columns, each with the tasks it is the mean of.
    """
    plain = next(iter(rows.values()))
    means = {task: is_mean([cells[task] for cells in rows.values()]) for tasks in columns.values() for task in tasks}
    records = []
    for row, cells in rows.items():
        own, drawn = [], []
        for column, tasks in columns.items():
            record = {"method": row.name, "keep_ratio": row.keep_ratio, "task": column}
            record |= _score([cells[task] for task in tasks], [plain[task] for task in tasks])
            record["low"] = record["high"] = None
            draws = None
            if all(means[task] for task in tasks):
                draws = share_draws([_drawn(cells[task], plain[task], task) for task in tasks])
                if limits := interval(draws):
                    record["low"], record["high"] = limits
            own.append(record)
            if record["higher_is_better"]:
                drawn.append(draws)
        records += [*own, _mean(row, own, drawn)]
    return records


def _score(cells: Sequence[Cell], plain: Sequence[Cell]) -> Record:
    score, reference = (float(np.mean([cell.score for cell in side])) for side in (cells, plain))
    weights = [cell.samples for cell in cells]
    return {
        "metric": cells[0].metric,
        "higher_is_better": cells[0].higher_is_better,
        "samples": sum(weights),
        "score": score,
        "share": score / reference if reference else None,
        **{name: float(np.average([cell.cost[name] for cell in cells], weights=weights)) for name in COSTS},
    }


def _drawn(cell: Cell, plain: Cell, task: str) -> np.ndarray:
    """Scores of both sides over drawn samples, (draws, 2)."""
    unit = plain.score / plain.mean_value if plain.mean_value else 1.0
    return unit * drawn_means(cell.values, plain.values, task)


def _mean(row: Row, records: Sequence[Record], drawn: Sequence[np.ndarray | None]) -> Record:
    """The mean share of a row's columns, its interval, and its cost: the mean over all columns."""
    shares = [record["share"] for record in records if record["higher_is_better"]]
    limits = None
    if drawn and all(draws is not None for draws in drawn):
        limits = interval(np.mean(drawn, axis=0))
    return {
        "method": row.name,
        "keep_ratio": row.keep_ratio,
        "task": MEAN,
        "metric": None,
        "higher_is_better": True,
        "samples": sum(record["samples"] for record in records),
        "score": None,
        "share": float(np.mean(shares)) if shares and None not in shares else None,
        **{name: float(np.mean([record[name] for record in records])) for name in COSTS},
        "low": limits[0] if limits else None,
        "high": limits[1] if limits else None,
    }
