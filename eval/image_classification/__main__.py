"""Trains and tests timm models with and without vltok methods on the same pictures, side by side.

    python -m eval.image_classification
    python -m eval.image_classification --data cifar.npz --arm softmax= --arm soft=soft,ratio=2 --seeds 0,1,2
    python -m eval.image_classification --data cifar.npz --finetune-steps 500 --finetune-lr 3e-4 --distill 0.5 \
        --arm "soft@classification-results/runs/softmax-seed{seed}-*.safetensors=soft,ratio=2"

Every arm gets the same pictures in the same order, the same augmentation, budget and, where a seed draws them, weights
in the parts that arms share. An arm that starts from a trained one has a budget of its own. The accuracy is that
after the last step; nothing is chosen on the test pictures. Prints a table and writes results.json, results.md and,
in runs/, every run with its weights; what is there is not made again. Nothing is downloaded unless
--pretrained asks for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from eval import options
from eval.image_classification import report
from eval.image_classification.arms import Arm, find_weights, parse_arms, parse_fields, parse_seeds, start_of
from eval.image_classification.data import count_classes, open_pictures
from eval.image_classification.models import ModelSpec, digest, read_weights
from eval.image_classification.preprocess import Task, for_model
from eval.image_classification.training import Recipe, evaluate, fit
from eval.measure import machine
from eval.store import Store
from eval.tables import write_json
from vltok.errors import VltokError

ARMS = ["softmax=", "soft=soft,ratio=2", "tap=tap", "adl=adl", "tuned@softmax=soft,ratio=2"]
SMALL_VIT = ("vit_tiny_patch16_224", "img_size=32,patch_size=4,embed_dim=64,depth=4,num_heads=2")
QUICK_VIT = ("vit_tiny_patch16_224", "img_size=32,patch_size=8,embed_dim=64,depth=2,num_heads=2")
QUICK = {"epochs": 12.0, "finetune_epochs": 4.0, "batch_size": 32, "lr": 2e-3}


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    shared = options.common(
        "device", "threads", "quick", "out", out=Path("classification-results"), quick="a smaller ViT and 12 epochs"
    )
    command = options.parser(__doc__, shared)
    add_data(command)
    add = command.add_argument
    add("--test", help="a folder of classes or an npz file, in the place of the test pictures of --data")
    add("--augment", help='"none", "crop-flip,pad=4,hflip=0" (mirrored but for digits) or "timm,SETTINGS"')
    add("--pretrained", action="store_true", help="fetch timm's published weights")
    add("--weights", help="file of first weights of arms without a start; {arm} and {seed} are filled in")
    add("--start-from", help="start of every arm that has methods and names none")
    said = dict(re.findall(r"^ {8}(\w+): (.+)\.$", Recipe.__doc__, re.MULTILINE))
    for each in fields(Recipe):
        kind = {"float": float, "str": str, "int": int}[each.type.split(" |")[0]]
        add(
            f"--{each.name.replace('_', '-')}", type=kind, default=each.default, help=said[each.name].replace("%", "%%")
        )
    add("--finetune-epochs", type=float, help="of arms with a start; by default as the others")
    add("--finetune-steps", type=int, help="their steps, in the place of epochs")
    add("--finetune-lr", type=float, help="their rate; by default as the others")
    add("--eval-every", type=int, help="steps between tests; by default an epoch")
    add("--eval-only", action="store_true", help="test --weights or --pretrained, train nothing")
    asked = options.parse(command, argv, QUICK)
    settle_model(asked)
    return asked


def add_data(command: argparse.ArgumentParser) -> None:
    """The options that `eval.robustness` has too."""
    add = command.add_argument
    add(
        "--data",
        default="digits",
        help="digits of scikit-learn, a folder with train/ and val/, or an npz (%(default)s)",
    )
    add("--model", help=f"name of a timm model; by default {SMALL_VIT[0]}, of the size of CIFAR")
    add("--model-kwargs", help="for timm.create_model: img_size=32,patch_size=4")
    add("--crop-pct", type=float, help="share of a larger picture's side that is looked at; by default the model's own")
    add("--arm", action="append", help="NAME=METHODS or NAME@START=METHODS, repeated; METHODS as a+b,x=1")
    add("--seeds", type=parse_seeds, default=[0], help="each arm is there once per seed, 0,1,2 (0)")
    add("--workers", type=int, default=0, help="processes that decode; 0 decodes in this one")
    add("--amp", action="store_true", help="multiply matrices in bfloat16")


def settle_model(asked: argparse.Namespace) -> None:
    """Fill in the model where none is named, and its arguments where none are."""
    if asked.model is None:
        asked.model, kwargs = QUICK_VIT if asked.quick else SMALL_VIT
        asked.model_kwargs = kwargs if asked.model_kwargs is None else asked.model_kwargs
    asked.model_kwargs = asked.model_kwargs or ""


class Bench:
    """The runs of all arms and seeds: what each depends on, and carrying out those that are not on disk yet."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.arms = asked, parse_arms(asked.arm or ARMS, asked.start_from)
        self.recipe = Recipe(**{each.name: getattr(asked, each.name) for each in fields(Recipe)})
        tuned = {"lr": asked.finetune_lr or asked.lr, "steps": asked.finetune_steps or asked.steps}
        tuned["epochs"] = asked.finetune_epochs or asked.epochs
        if asked.finetune_epochs:
            tuned["steps"] = asked.finetune_steps
        self.tuning, self.recipe = replace(self.recipe, **tuned), replace(self.recipe, distill=0.0)
        for arm in self.arms:
            start_of(arm, self.arms)
        if asked.eval_only and not (asked.pretrained or asked.weights or all(arm.start for arm in self.arms)):
            raise ValueError("--eval-only tests trained weights: give --weights FILE or --pretrained")
        self.spec = ModelSpec(asked.model, parse_fields(asked.model_kwargs), asked.pretrained)
        train = None if asked.eval_only else open_pictures(asked.data, "train")
        test = open_pictures(asked.test or asked.data, "test")
        self.classes = self.spec.kwargs.get("num_classes", count_classes(train, test))
        if self.classes < count_classes(train, test):
            raise ValueError(f"the pictures have {count_classes(train, test)} classes, the model {self.classes}")
        plain = replace(self.spec, pretrained=False).create(0, self.classes)
        preprocess = for_model(plain, self.spec.kwargs.get("in_chans"), asked.crop_pct)
        augment = asked.augment or ("crop-flip,hflip=0" if asked.data == "digits" else "crop-flip")
        self.task = Task(train, test, preprocess, augment, asked.device, asked.workers, asked.amp)
        self.store = Store(asked.out / "runs", machine(asked.device))

    def settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that the result of a run depends on, as plain data."""
        start = start_of(arm, self.arms)
        recipe = asdict(self.tuning if arm.start else self.recipe)
        settings = {"methods": arm.settings, "seed": seed, "model": asdict(self.spec), "classes": self.classes}
        settings |= {"task": self.task.about, "recipe": recipe, "eval_every": self.asked.eval_every}
        settings["trains"] = not self.asked.eval_only
        if start is not None:
            settings["start"] = self.settings(start, seed)
        elif (path := self._first_weights(arm, seed)) is not None:
            settings["weights"] = digest(read_weights(path))
        return settings

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Make one run, or read it; returns its record."""
        name, settings = f"{arm.name}-seed{seed}", self.settings(arm, seed)
        path = self._path(arm, seed)
        record = self.store.get(name, settings, partial(self._make, arm, seed, path))
        about = {"arm": arm.name, "start": arm.start, "methods": arm.words, "seed": seed, "settings": settings}
        return about | record | ({} if self.asked.eval_only else {"weights": str(path.relative_to(self.asked.out))})

    def _make(self, arm: Arm, seed: int, path: Path) -> dict[str, Any]:
        first = self._first_weights(arm, seed)
        # weights of a start are of a model without methods
        spec = self.spec if arm.start is None else replace(self.spec, pretrained=False)
        model, handle = spec.build(seed, self.classes, arm.methods, first)
        model.to(self.asked.device)
        record = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if self.asked.eval_only:
            return record | evaluate(model, self.task)
        recipe = self.tuning if arm.start else self.recipe
        teacher = spec.build(seed, self.classes, (), first)[0].to(self.asked.device) if arm.start else None
        with tqdm(
            total=recipe.total_steps(self.task.count), desc=f"{arm.name}, seed {seed}", leave=False, disable=None
        ) as bar:

            def advance(note: str) -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update()

            model, result = fit(
                model,
                handle,
                self.task,
                recipe,
                seed,
                teacher=teacher,
                eval_every=self.asked.eval_every,
                advance=advance,
            )
        before = {"top1_before": result["curve"][0]["top1"]} if arm.start else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous().clone() for name, value in model.state_dict().items()}, path)
        print(
            f"{arm.name}, seed {seed}: top-1 {100 * result['top1']:.2f} %, {result['seconds']:.0f} s", file=sys.stderr
        )
        return record | before | result

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.store.path(f"{arm.name}-seed{seed}", self.settings(arm, seed)).with_suffix(".safetensors")

    def _first_weights(self, arm: Arm, seed: int) -> Path | None:
        """The file a run starts from: of another arm, or named by the options; None for random or published weights."""
        start = start_of(arm, self.arms)
        pattern = arm.start or self.asked.weights
        if start is not None:
            return self._path(start, seed)
        return None if pattern is None else find_weights(pattern, arm, seed)


def main(argv: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    asked = read(argv)
    torch.set_flush_denormal(True)
    try:
        bench = Bench(asked)
        runs = [bench.run(arm, seed) for seed in asked.seeds for arm in bench.arms]
    except (VltokError, ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    rows = report.summarise(runs)
    notes = [
        f"{runs[0]['tested']:,} test pictures" + f", {bench.task.count:,} training pictures" * (not asked.eval_only)
    ]
    notes += ["± standard deviation over seeds"] if len(asked.seeds) > 1 else []
    shown = report.table(rows, asked.model, notes)
    name = "evaluation" if asked.eval_only else "results"
    about = {key: getattr(asked, key) for key in ("data", "model", "model_kwargs", "crop_pct", "seeds")}
    write_json(asked.out / f"{name}.json", about | {"machine": bench.store.notes, "arms": rows, "runs": runs})
    (asked.out / f"{name}.md").write_text(shown.markdown(), encoding="utf-8")
    print(shown.text(), f"written to {asked.out}", sep="\n")
    return runs


if __name__ == "__main__":
    main()
