"""All contenders on all parts: what is on disk is kept, what is missing is measured and kept at once."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from eval.robustness.setup import Setup
from eval.robustness.store import Store

Wanted = Mapping[str, Sequence[int]]  # for the name of a cell the numbers of models
Measured = Iterator[tuple[str, dict[int, dict[str, Any]]]]  # the name of a cell, and figures by number of the model
Results = dict[str, list[dict[str, Any]]]  # by name of the arm, for every seed its notes and figures by cell


class Contender(Protocol):
    """A model of the bench; `name` is the row of the table, shared by the models of all seeds."""

    @property
    def name(self) -> str: ...

    def build(self, setup: Setup) -> nn.Module:
        """Make the model, in eval mode, on the setup's device."""

    def store(self, model: nn.Module, setup: Setup, folder: Path) -> Store:
        """Where the model's results are kept."""


class Part(Protocol):
    """Cells that share their pictures; `cells` are their names."""

    cells: Collection[str]

    def open(self) -> None:
        """Open the pictures; nothing else but `cells` may be asked before."""

    def close(self) -> None:
        """Let go of them."""

    def count(self, cell: str) -> int:
        """Pictures or sequences of a cell."""

    def settings(self, cell: str) -> dict[str, Any]:
        """All that decides what is measured, the model apart."""

    def measure(self, wanted: Wanted, models: Sequence[nn.Module], advance: Callable[[str, int], Any]) -> Measured:
        """Measure cells, each for some of the models; `advance` is told of a cell how many more pictures are done."""


def run(
    contenders: Sequence[Contender],
    parts: Sequence[Part],
    setup: Setup,
    folder: Path,
    *,
    at_once: int = 16,
    begin: Callable[[str, int], Any] = lambda cell, count: None,
    advance: Callable[[str, int], Any] = lambda cell, count: None,
    done: Callable[[int, bool], Any] = lambda count, is_new: None,
) -> Results:
    """Measure what is missing.

    Args:
        contenders: The models.
        parts: Where they are tested; every name of a cell comes once.
        setup: Of the bench.
        folder: Where results are kept, a file per contender.
        at_once: Models that are held in memory together and see every picture as it is made.
        begin: Told which cell begins, and how many pictures or sequences it has.
        advance: Told of a cell how many more of them are done.
        done: Told how many more results are there, and whether they are new.

    Returns:
        For each arm a record per seed: its notes, "settings" and "cells", the figures by name of the cell.

    Raises:
        ValueError: If results on disk are of other settings, or pictures don't fit the model.
    """
    results: Results = {}
    for start in range(0, len(contenders), at_once):
        group = contenders[start : start + at_once]
        models = [each.build(setup) for each in group]
        stores = [each.store(model, setup, folder) for each, model in zip(group, models, strict=True)]
        figures: list[dict[str, Any]] = [{} for _ in group]
        for part in parts:
            part.open()
            wanted: dict[str, list[int]] = {}
            for cell, (number, store) in itertools.product(part.cells, enumerate(stores)):
                found = store.read(cell, part.settings(cell))
                figures[number][cell] = found
                if found is None:
                    wanted.setdefault(cell, []).append(number)
                else:
                    setup.report(found["faults"])
                    done(1, False)
            for cell in wanted:
                begin(cell, part.count(cell))
            for cell, measured in part.measure(wanted, models, advance):
                for number, result in measured.items():
                    stores[number].write(cell, part.settings(cell), result)
                    figures[number][cell] = result
                done(len(measured), True)
            part.close()
        for each, store, cells in zip(group, stores, figures, strict=True):
            record = {**store.notes, "settings": dict(store.settings), "cells": cells}
            results.setdefault(each.name, []).append(record)
        del models
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    return results
