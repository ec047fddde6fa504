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
from vltok.errors import UnsupportedInputError


class CellError(Exception):
    """A cell that could not be finished; says which."""


class Bench(Protocol):
    """What runs a cell, see `eval.benchmarks.harness.Bench`."""

    def put_on(self, row: Row) -> Any: ...

    def run(self, task: str) -> Cell | None: ...


Key = tuple[str, dict[str, Any]]  # the name of what is in the store, and all that decides it


def run(
    bench: Bench,
    rows: Sequence[Row],
    tasks: Mapping[str, Mapping[str, Any]],
    setup: Mapping[str, Any],
    store: Store,
) -> tuple[dict[Row, dict[str, Cell]], list[str]]:
    """Finish all cells that the store lacks, row by row.

    With several processes all of them answer, and the first one reads and writes. A floor that an image can't have, as
    pooling where visual tokens form no grid, is left out; this is remembered, too.

    Args:
        bench: Runs a cell.
        rows: What is compared.
        tasks: Single tasks by name, each with what decides what it asks.
        setup: What decides the rest.
        store: Where finished cells are.

    Returns:
        The cells of the rows that there are, and why others are not. Both empty in all processes but the first.

    Raises:
        CellError: If a cell fails; those before it are in the store.
    """
    keys = {row: {task: _key(row, f"{task} {row.label}", setup, own) for task, own in tasks.items()} for row in rows}
    refused = {row: _key(row, f"refused {row.label}", setup, {"tasks": list(tasks)}) for row in rows if row.is_floor}
    state = PartialState()
    first = state.is_main_process
    missing = [_missing(keys, refused, store) if first else None]
    broadcast_object_list(missing)
    total = sum(map(len, keys.values()))
    with tqdm(total=total, initial=total - sum(map(len, missing[0].values())), desc="cells", disable=not first) as bar:
        for row, own in missing[0].items():
            with bench.put_on(row):
                for task in own:
                    bar.set_postfix_str(f"{row.label}, {task}")
                    try:
                        cell = bench.run(task)
                    except Exception as error:
                        failure = CellError(f"{row.label}, {task}: {error}")
                        if not (row.is_floor and isinstance(error.__cause__, UnsupportedInputError)):
                            raise failure from error
                        store.write(*refused[row], f"No row for {failure}")
                        if state.num_processes > 1:  # the others wait for this one's answers
                            raise CellError(f"{failure}; start again, which goes on without this row") from error
                        break
                    if first:
                        store.write(*keys[row][task], asdict(cell))
                    bar.update(1)
    if not first:
        return {}, []
    notes = {row: store.read(*each) for row, each in refused.items()}
    own = {row: own for row, own in keys.items() if notes.get(row) is None}
    cells = {row: {task: Cell(**store.read(*each)) for task, each in own.items()} for row, own in own.items()}
    return cells, [note for note in notes.values() if note is not None]


def _key(row: Row, name: str, setup: Mapping[str, Any], task: Mapping[str, Any]) -> Key:
    return name, {**setup, **row.settings(), **task}


def _missing(keys: Mapping[Row, Mapping[str, Key]], refused: Mapping[Row, Key], store: Store) -> dict[Row, list[str]]:
    """The tasks that each row lacks, for rows that lack some and are not known to be refused."""
    found = {row: [task for task, key in own.items() if store.read(*key) is None] for row, own in keys.items()}
    return {row: own for row, own in found.items() if own and (row not in refused or store.read(*refused[row]) is None)}
