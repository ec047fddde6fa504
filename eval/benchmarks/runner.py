"""Every row on every task, one cell at a time; finished cells are read from disk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from eval.benchmarks.plan import Row
from eval.benchmarks.results import Cell
from eval.store import Store


class CellError(Exception):
    """A cell that could not be finished; says which."""


class Bench(Protocol):
    """What runs a cell, see `eval.benchmarks.harness.Bench`."""

    def put_on(self, row: Row) -> Any: ...

    def run(self, task: str) -> Cell | None: ...


def key(row: Row, task: Mapping[str, Any], setup: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a cell, and all that decides what is in it."""
    return f"{task['task']} {row.label}", {**setup, **row.settings(), **task}


def run(
    bench: Bench,
    rows: Sequence[Row],
    tasks: Mapping[str, Mapping[str, Any]],
    setup: Mapping[str, Any],
    store: Store,
) -> dict[Row, dict[str, Cell]]:
    """Finish all cells that the store lacks, row by row, and return all.

    With several processes all of them answer, and the first one reads and writes.

    Args:
        bench: Runs a cell.
        rows: What is compared.
        tasks: Single tasks by name, each with what decides what it asks.
        setup: What decides the rest.
        store: Where finished cells are.

    Raises:
        CellError: If a cell fails; those before it are in the store.
    """
    keys = {(row, task): key(row, settings, setup) for row in rows for task, settings in tasks.items()}
    first = PartialState().is_main_process
    missing = [[each for each in keys if store.read(*keys[each]) is None] if first else None]
    broadcast_object_list(missing)
    with tqdm(total=len(keys), initial=len(keys) - len(missing[0]), desc="cells", disable=not first) as bar:
        for row in rows:
            own = [task for each, task in missing[0] if each == row]
            if not own:
                continue
            with bench.put_on(row):
                for task in own:
                    bar.set_postfix_str(f"{row.label}, {task}")
                    try:
                        cell = bench.run(task)
                    except Exception as error:
                        raise CellError(f"{row.label}, {task}: {error}") from error
                    if first:
                        store.write(*keys[row, task], asdict(cell))
                    bar.update(1)
    if not first:
        return {}
    return {row: {task: Cell(**store.read(*keys[row, task])) for task in tasks} for row in rows}
