"""All models on all cells: what is on disk is kept, what is missing is measured and kept at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval import options
from eval.robustness.corruptions import parse_corruptions, parse_severities
from eval.robustness.scores import CORRUPTIONS
from eval.store import Store

Results = dict[str, dict[str, dict[str, Any]]]  # by name of the model, by name of the cell, its figures


@dataclass(frozen=True)
class Model:
    """A model of the bench, in eval mode, on its device.

    Attributes:
        module: The model.
        settings: All that decides what it answers, as plain data.
    """

    module: nn.Module
    settings: Mapping[str, Any]


class Cell(Protocol):
    """Pictures of one kind, such as a corruption at one severity."""

    name: str

    def open(self) -> dict[str, Any]:
        """Open the pictures; returns all that decides what is measured, the models apart."""

    def batches(self) -> Iterable[Any]:
        """The pictures, each made once for all models."""

    def tally(self, module: nn.Module) -> Any:
        """What counts the answers of a model: `update(module, batch)`, then `compute()` gives the figures."""


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        device: Where models compute.
        amp: Whether matrix products are made in bfloat16.
        batch_size: Pictures that go through a model together.
        workers: Processes that decode and corrupt; 0 does so in this one.
        limit: How many pictures are taken of each source, spread evenly over it; None for all.
        seed: Of the corruptions.
    """

    device: str = "cpu"
    amp: bool = False
    batch_size: int = 64
    workers: int = 0
    limit: int | None = None
    seed: int = 0

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products where it is asked for."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.amp)

    def choose(self, count: int) -> list[int]:
        """Which of `count` things are looked at, ascending."""
        limit = count if self.limit is None else min(self.limit, count)
        return (np.arange(limit) * count // limit).tolist()

    def load(self, data: Dataset, order: Sequence[Any], batch_size: int | None = None) -> DataLoader:
        """Items of a dataset in an order, in batches; without a size one by one, as they are."""
        collate = None if batch_size else _as_it_is
        return DataLoader(
            data, batch_size, sampler=order, num_workers=min(self.workers, len(order)), collate_fn=collate
        )


def run(models: Mapping[str, Model], cells: Sequence[Cell], store: Store) -> Results:
    """Measure what is missing.

    Args:
        models: The models by name.
        cells: Where they are tested, each with a name of its own.
        store: Where results are kept, and read from if they are there.
    """
    results: Results = {name: {} for name in models}
    for cell in tqdm(cells, "cells", disable=None, leave=False):
        about = cell.open()
        asked = {
            name: (f"{name} {cell.name}", {"model": model.settings, "cell": about}) for name, model in models.items()
        }
        found = {name: store.read(*what) for name, what in asked.items()}
        tallies = {name: cell.tally(models[name].module) for name, figures in found.items() if figures is None}
        with torch.inference_mode():
            for batch in cell.batches() if tallies else ():
                for name, tally in tallies.items():
                    tally.update(models[name].module, batch)
        found |= {name: store.write(*asked[name], tally.compute()) for name, tally in tallies.items()}
        for name, figures in found.items():
            results[name][cell.name] = figures
    return results


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the corruptions and of the bench."""
    add = command.add_argument
    add("--corruptions", default="all", help='"all" 15 of ImageNet-C, "none", or names with commas (%(default)s)')
    add("--severities", default="1,2,3,4,5", help="of each; mCE is defined by all of them (%(default)s)")
    add("--corruption-seed", type=int, default=0, help="of all that is random in corruptions (%(default)s)")
    add("--limit", type=options.count, help="look at so many pictures of each source, spread evenly over it")


def setup_of(asked: argparse.Namespace) -> Setup:
    """The setup that the options ask for."""
    return Setup(
        asked.device, asked.amp, getattr(asked, "batch_size", 1), asked.workers, asked.limit, asked.corruption_seed
    )


def planned(asked: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """Every corruption and severity asked for, by the name of its cell, such as "corruption/fog/3"."""
    severities = parse_severities(asked.severities)
    return {f"corruption/{name}/{s}": (name, s) for name in parse_corruptions(asked.corruptions) for s in severities}


def by_corruption(cells: Mapping[str, Mapping[str, Any]], figure: str) -> dict[str, dict[int, float]]:
    """One figure of the corrupted cells, by corruption and severity."""
    found: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    for name, figures in cells.items():
        if name.startswith("corruption/"):
            _, corruption, severity = name.split("/")
            found[corruption][int(severity)] = figures[figure]
    return {name: values for name, values in found.items() if values}


def _as_it_is(item: Any) -> Any:
    return item
