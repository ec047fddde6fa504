"""Tests image classifiers, with and without vltok methods, on corrupted, unusual and slightly moving pictures.

    python -m eval.robustness
    python -m eval.robustness --model vit_tiny_patch16_224 --model-kwargs img_size=32,patch_size=4,depth=4 \
        --data cifar.npz --arm plain= --arm tap=tap --seeds 0,1 --weights "runs/{arm}-seed{seed}-*.safetensors"
    python -m eval.robustness --model deit_small_patch16_224 --pretrained --arm plain= \
        --data imagenet/val --imagenet-c imagenet-c --imagenet-p imagenet-p --subset imagenet-a=imagenet-a --workers 8

Without --arm it tests what `eval.image_classification` left in --trained, and has that train its quick arms if there is
nothing yet. Corrupted pictures are made once for all models; what they look like depends on the seed, the number of the
picture, the corruption and its severity alone. Prints tables and writes results.json, results.md, a file per model in
robustbench/ and results-*.csv in timm's format. Every result is kept in runs/ as soon as it is there. mCE and mFR are
given where all that they are made of was measured.

The corruptions have the strengths of ImageNet-C, made for pictures of 224 x 224. At 32 x 32 they are far harsher than
those of CIFAR-C: errors of small pictures compare the arms with each other, not with published figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vltok
from eval import options
from eval.image_classification import __main__ as training
from eval.image_classification.arms import WEIGHTS, Arm, find_weights, parse_arms, parse_fields
from eval.image_classification.data import open_pictures
from eval.image_classification.models import digest
from eval.measure import machine
from eval.robustness import bench, report
from eval.robustness.classifiers import Classifiers, open_classifiers
from eval.robustness.pictures import plan_cells
from eval.store import Store
from eval.tables import write_json
from vltok.errors import VltokError


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    shared = options.common("device", "threads", "quick", "out", out=Path("robustness-results"), quick="40 pictures")
    command = options.parser(__doc__, shared)
    training.add_data(command)
    command.set_defaults(data=None)
    bench.add_options(command)
    add = command.add_argument
    add("--batch-size", type=options.count, default=64, help="pictures that go through a model together (%(default)s)")
    trained = Path("classification-results")
    add("--trained", type=Path, default=trained, help="folder of eval.image_classification (%(default)s)")
    add("--corrupt", choices=("input", "picture"), default="input", help="before or after resizing (%(default)s)")
    add("--imagenet-c", type=Path, help="folder of corrupted pictures, CORRUPTION/SEVERITY/CLASS/FILE")
    add("--subset", action="append", default=[], help="NAME=FOLDER of some classes, repeated: answers are among these")
    add("--imagenet-p", type=Path, help="folder of sequences, PERTURBATION/CLASS/SEQUENCE, videos or folders of frames")
    add("--classes", type=Path, help="names of the model's outputs: a file with one per line, or a folder of classes")
    add("--pretrained", action="store_true", help="fetch published weights; nothing else is ever downloaded")
    add("--weights", help="file of weights of arms that name none; {arm} and {seed} are filled in, * is any text")
    return options.parse(command, argv, {"limit": 40})


def take_trained(asked: argparse.Namespace) -> None:
    """Let the options say what `eval.image_classification` left in --trained; it makes that if it isn't there."""
    path = asked.trained / "results.json"
    if not path.is_file():
        print(f"training the quick arms of eval.image_classification into {asked.trained}", file=sys.stderr)
        threads = [] if asked.threads is None else ["--threads", str(asked.threads)]
        training.main(["--quick", "--out", str(asked.trained), "--device", asked.device, *threads])
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("data", "model", "model_kwargs", "crop_pct", "seeds"):
        setattr(asked, name, found[name])
    methods = {run["arm"]: run["settings"]["methods"] for run in found["runs"]}
    texts = {arm: "+".join(map(json.dumps, settings)) for arm, settings in methods.items()}
    asked.arm = [f"{arm}={text}" for arm, text in texts.items()]
    asked.weights = str(asked.trained / "runs" / "{arm}-seed{seed}-*.safetensors")


def build(arm: Arm, seed: int, classifiers: Classifiers, asked: argparse.Namespace) -> bench.Model:
    """Make a model with the weights of a seed.

    Raises:
        ValueError: If the options leave it without trained weights.
        OSError: If weights are not there.
    """
    is_adapter = arm.start is not None and Path(arm.start).suffix not in WEIGHTS
    pattern = asked.weights if is_adapter or arm.start is None else arm.start
    if len(asked.seeds) > 1 and not any("{seed}" in each for each in (arm.start, pattern) if each):
        raise ValueError(f"the seeds of arm {arm.name!r} would be the same model: put {{seed}} into the weights' names")
    if pattern is None and not classifiers.has_weights:
        raise ValueError(f"arm {arm.name!r} has no trained weights: give --weights, NAME@FILE=METHODS or --pretrained")
    if is_adapter and arm.methods:
        raise ValueError(f"arm {arm.name!r} starts from the folder {arm.start}, which says itself what its methods are")
    weights = None if pattern is None else find_weights(pattern, arm, seed)
    model = classifiers.build(seed, arm.methods, weights)
    if is_adapter:
        vltok.load(model, find_weights(arm.start, arm, seed))
    model = model.eval().to(asked.device)
    about = {"methods": arm.settings, "digest": digest(model.state_dict()), "amp": asked.amp}
    return bench.Model(model, about | dict(classifiers.settings))


def measure(asked: argparse.Namespace) -> tuple[list[report.Row], bench.Results]:
    """Measure what is missing; returns what is said of every model, and its cells."""
    if asked.arm is asked.model is asked.weights is None and not asked.pretrained:
        take_trained(asked)
    training.settle_model(asked)
    if not (asked.data or asked.imagenet_c or asked.subset or asked.imagenet_p):
        asked.data = "digits"
    clean = open_pictures(asked.data, "test") if asked.data else None
    classifiers = open_classifiers(
        asked.model,
        parse_fields(asked.model_kwargs),
        clean,
        pretrained=asked.pretrained,
        crop_pct=asked.crop_pct,
        classes=asked.classes,
    )
    arms = parse_arms(asked.arm or ["plain="])
    cells = plan_cells(
        classifiers,
        bench.setup_of(asked),
        clean,
        bench.planned(asked),
        asked.corrupt,
        imagenet_c=asked.imagenet_c,
        subsets=asked.subset,
        imagenet_p=asked.imagenet_p,
    )
    models = {(arm, seed): build(arm, seed, classifiers, asked) for arm in arms for seed in asked.seeds}
    names = {key: f"{key[0].name}-seed{key[1]}" for key in models}
    store = Store(asked.out / "runs", machine(asked.device))
    results = bench.run({names[key]: model for key, model in models.items()}, cells, store)
    config = getattr(classifiers.preprocess, "config", {"crop_pct": "", "interpolation": ""})
    config = {**config, "size": classifiers.preprocess.input_size[1]}
    rows = []
    for (arm, seed), model in models.items():
        name = names[arm, seed]
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        about: dict[str, Any] = {"name": name, "arm": arm.name, "methods": arm.words, "seed": seed}
        about |= {"parameters": parameters, "architecture": asked.model, "config": config, "settings": model.settings}
        rows.append(about | report.scores(results[name]))
    return rows, results


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    torch.set_flush_denormal(True)
    try:
        models, results = measure(asked)
    except (VltokError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    rows = report.summarise(models)
    first = next(iter(results.values()))
    notes = [f"{first['clean']['tested']:,} clean pictures"] if "clean" in first else []
    notes += [f"severities {asked.severities}, seed {asked.corruption_seed}"] if rows[0]["by_corruption"] else []
    notes += ["± standard deviation over seeds"] if len(asked.seeds) > 1 else []
    if rows[0]["by_corruption"] and rows[0]["mce"] is None:
        notes.append("no mCE: it is defined by all 15 corruptions at all 5 severities")
    if rows[0]["flip_rates"] and rows[0]["mfr"] is None:
        notes.append("no mFR: it is defined by all 10 perturbations of ImageNet-P")
    shown = report.tables(rows, asked.model, notes)
    runs = [model | {"cells": results[model["name"]]} for model in models]
    write_json(asked.out / "results.json", {"machine": machine(asked.device), "arms": rows, "runs": runs})
    report.write_robustbench(asked.out / "robustbench", models, asked.data or "imagenet")
    report.write_csv(asked.out, models, results)
    (asked.out / "results.md").write_text("\n".join(table.markdown() for table in shown), encoding="utf-8")
    print(*(table.text() for table in shown), f"written to {asked.out}", sep="\n")


if __name__ == "__main__":
    main()
