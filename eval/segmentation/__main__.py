"""Measures the mean intersection over union of Hugging Face segmentation models on clean and corrupted pictures.

    python -m eval.segmentation
    python -m eval.segmentation --data cityscapes --model b0=segformer-b0 --model b5=segformer-b5 --workers 8
    python -m eval.segmentation --data acdc --model segformer-b5 --corruptions none

Without --data it draws scenes of scikit-learn's digits, and without --model it trains a small SegFormer on others.
Corruptions are those of eval.robustness, made of the pictures at their full size, once for all models. Prints tables
and writes results.json and results.md; every result is kept in runs/ as soon as it is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval import options
from eval.image_classification.report import cell, spread
from eval.measure import machine
from eval.robustness import bench
from eval.robustness.report import details
from eval.robustness.scores import corruption_means, severity_means
from eval.segmentation import digits
from eval.segmentation.layouts import Pairs, find_pairs
from eval.segmentation.masks import Masks, Network
from eval.store import Store
from eval.tables import Table, write_json


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    few = "8 pictures, 200 steps of training"
    shared = options.common("device", "threads", "quick", "out", out=Path("segmentation-results"), quick=few)
    command = options.parser(__doc__, shared)
    bench.add_options(command)
    add = command.add_argument
    add("--data", type=Path, help="folder with images/ and masks/, Cityscapes or ACDC; 255 in masks is left out")
    add("--layout", default="auto", help='"folder", "cityscapes", "acdc", or "auto" for what is there')
    add("--split", default="val", help="of Cityscapes and ACDC (%(default)s)")
    add("--reduce-labels", action=argparse.BooleanOptionalAction, help="0 in masks is no class, as in ADE20K")
    add("--model", action="append", help="NAME=FOLDER or FOLDER of save_pretrained, repeated")
    add("--resize", action=argparse.BooleanOptionalAction, default=True, help="to the size of the image processor")
    add("--workers", type=int, default=0, help="processes that decode and corrupt; 0 does so in this one")
    add("--amp", action="store_true", help="multiply matrices in bfloat16")
    add("--steps", type=options.count, default=600, help="of training where no model is given (%(default)s)")
    return options.parse(command, argv, {"limit": 8, "steps": 200})


def open_models(texts: Sequence[str], resizes: bool, device: str) -> dict[str, Network]:
    """Open "NAME=FOLDER", or folders alone that are named after themselves.

    Raises:
        ValueError: If a name comes twice.
    """
    folders = {}
    for text in texts:
        name, equals, folder = text.rpartition("=")
        folders[(name if equals else Path(folder).name).replace("/", "-")] = folder
    if len(folders) < len(texts) or "" in folders:
        raise ValueError(f"give models as NAME=FOLDER, every name once; got {', '.join(texts)}")
    return {name: Network(folder, resizes, device) for name, folder in folders.items()}


def does_reduce(said: bool | None, models: Mapping[str, Network], found: Pairs) -> bool:
    """Whether 0 in a mask is no class: as the option says, else for a plain folder as the image processors say."""
    if said is not None or found.layout != "folder":
        return bool(said)
    processors = {bool(getattr(each.processor, "do_reduce_labels", False)) for each in models.values()}
    if len(processors) > 1:
        raise ValueError("the models' image processors differ in do_reduce_labels: say --reduce-labels or not")
    return processors.pop()


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is missing; returns one row per model."""
    if asked.data is None:
        asked.data = asked.out / "digits"
        digits.write_scenes(asked.data, 64)
    if asked.model is None:
        folder = asked.out / f"segformer-{asked.steps}"
        if not (folder / "config.json").is_file():
            digits.train(folder, asked.steps, asked.device)
        asked.model = [str(folder)]
    models = open_models(asked.model, asked.resize, asked.device)
    found = find_pairs(asked.data, asked.layout, asked.split)
    for name, model in models.items():
        if found.classes is not None and len(model.class_names) != len(found.classes):
            count = f"{len(model.class_names)} classes; {found.layout} is tested with {len(found.classes)}"
            raise ValueError(f"{name} has {count}")
    setup, reduces = bench.setup_of(asked), does_reduce(asked.reduce_labels, models, found)
    plan = {"clean": (None, 0)} | bench.planned(asked)
    cells = [Masks(name, asked.data, found, setup, how, reduces) for name, how in plan.items()]
    described = {name: model.described(asked.amp) for name, model in models.items()}
    results = bench.run(described, cells, Store(asked.out / "runs", machine(asked.device)))
    return [summarise(name, model, results[name], found.classes or model.class_names) for name, model in models.items()]


def summarise(name: str, model: Network, cells: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """mIoU as shares on clean pictures, by group of these, and by corruption and severity; and all cells."""
    by = bench.by_corruption(cells, "miou")
    means = corruption_means(by)
    return {
        "arm": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "clean": cells["clean"]["miou"],
        "corrupted": sum(means.values()) / len(means) if means else None,
        "groups": cells["clean"]["groups"],
        "by_corruption": {each: spread([value]) for each, value in means.items()},
        "by_severity": {each: spread([value]) for each, value in severity_means(by).items()},
        "iou": dict(zip(classes, cells["clean"]["iou"], strict=True)),
        "cells": cells,
    }


def tables(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> list[Table]:
    """IoU of every class, mIoU by corruption and severity, and the scores."""
    classes = Table(["class", *(row["arm"] for row in rows)], "IoU % on clean pictures")
    for name in dict.fromkeys(name for row in rows for name in row["iou"]):
        classes.add(name, *(_percent(row["iou"].get(name)) for row in rows))
    groups = list(rows[0]["groups"])
    scores = Table(["model", "parameters", "clean", *groups, "corrupted,\nmean"], "mIoU %", notes)
    for row in rows:
        each = [row["clean"], *(row["groups"].get(group) for group in groups), row["corrupted"]]
        scores.add(row["arm"], f"{row['parameters']:,}", *map(_percent, each))
    corrupted = details(rows, "mIoU % of corrupted pictures", ["by_corruption", "by_severity"])
    return [classes, *corrupted, scores]


def _percent(share: float | None) -> str | None:
    return None if share is None else cell(spread([share]))


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    torch.set_flush_denormal(True)
    try:
        rows = measure(asked)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    tested = rows[0]["cells"]["clean"]["tested"]
    shown = tables(rows, [f"{tested:,} pictures of {asked.data}", f"corruption seed {asked.corruption_seed}"])
    write_json(asked.out / "results.json", {"machine": machine(asked.device), "arms": rows})
    (asked.out / "results.md").write_text("\n".join(table.markdown() for table in shown), encoding="utf-8")
    print(*(table.text() for table in shown), f"written to {asked.out}", sep="\n")


if __name__ == "__main__":
    main()
