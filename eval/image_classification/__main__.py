"""`python -m eval.image_classification`: timm models with and without vltok methods, side by side on the same pictures.

Every arm gets the same pictures in the same order, the same augmentation, budget and, where a seed draws them, the same
weights in the parts that arms share. The accuracy is that after the last step; nothing is chosen on the test pictures.

Where the time goes: pictures are decoded and resized once by timm's transform for evaluation, and held as uint8 tensors
where they fit into --memory. Batches are then cut out by index, shifted and mirrored as a whole, and scaled on the
device, which takes about a percent of a small model's step on one core; "data_share" in the JSON says how much it was.
`--augment timm` instead runs timm's random transform on every picture in every epoch, for which to set --workers.
"""

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.image_classification import report
from eval.image_classification.arms import plan_arms
from eval.image_classification.augment import parse_augment
from eval.image_classification.bench import Bench
from eval.image_classification.data import open_data
from eval.image_classification.distill import Distillation
from eval.image_classification.models import ModelSpec
from eval.image_classification.recipe import Recipe
from eval.image_classification.records import Records
from eval.image_classification.settings import parse_fields, parse_seeds, pick_device
from eval.image_classification.task import prepare
from vltok.errors import VltokError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CONSOLE = Console(stderr=True)


class FaultName(StrEnum):
    """What to do about a picture that can't be decoded."""

    stop = "stop"
    drop = "drop"


def _option(group: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, **limits)


DATA, MODEL, ARMS, TRAIN, START, RUN = (
    "Pictures",
    "Model",
    "Arms: what is compared",
    "Training",
    "Arms that start from a trained model",
    "Run",
)


EXAMPLES = """\
Train a small ViT plain and with SOFT from scratch, three seeds each:

--data cifar.npz --model vit_tiny_patch16_224 --model-kwargs img_size=32,patch_size=4,depth=4
--arm softmax= --arm soft=soft,ratio=2 --seeds 0,1,2

Then turn the trained plain ones into SOFT, with the logits of the plain ones as a guide:

--arm soft@classification-results/runs/softmax-seed{seed}.safetensors=soft,ratio=2
--finetune-steps 500 --finetune-lr 3e-4 --distill 0.5 --eval-every 50 --out tuned
"""
SPLITS = ("training", "test")


@app.command(epilog=EXAMPLES)
def main(
    *,
    data: Annotated[
        Path,
        _option(
            DATA,
            "Folder with train/ and val/ or test/, a subfolder per class in each; or an npz file: images (n, H, W, C), "
            "labels, or jpeg (bytes), offsets (n + 1) and labels, and perhaps classes, of training pictures alone "
            "or of both, with train_ and test_ before the names.",
        ),
    ],
    test: Annotated[Path | None, _option(DATA, "Test pictures: a folder of classes, or an npz file.")] = None,
    holdout: Annotated[
        float, _option(DATA, "Test on this share of the training pictures, kept from training.", min=0, max=0.9)
    ] = 0.0,
    augment: Annotated[
        str,
        _option(
            DATA,
            'Of training pictures: "crop-flip,pad=4", with hflip=0 not mirrored; "none"; or "timm,scale=(0.6,1)" with '
            "any settings of create_transform in timm.data.",
        ),
    ] = "crop-flip",
    input_size: Annotated[int | None, _option(DATA, "Side of the model's input; by default its own.", min=1)] = None,
    crop_pct: Annotated[
        float | None,
        _option(
            DATA,
            "Share of a test picture's side that is looked at. By default the model's own; 1 where no test "
            "picture is larger than the input.",
            min=0.1,
            max=1.0,
        ),
    ] = None,
    on_bad_image: Annotated[FaultName, _option(DATA, "For pictures that can't be decoded.")] = FaultName.stop,
    memory: Annotated[float, _option(DATA, "Hold decoded pictures in memory up to so many GiB.", min=0)] = 4.0,
    workers: Annotated[int, _option(DATA, "Processes that decode; 0 decodes in this one.", min=0)] = 0,
    model: Annotated[str, _option(MODEL, "Name of a timm model; see timm.list_models().")],
    model_kwargs: Annotated[
        str, _option(MODEL, 'For timm.create_model: "img_size=32,patch_size=4,depth=4", say.')
    ] = "",
    pretrained: Annotated[bool, _option(MODEL, "Fetch timm's published weights.", "--pretrained")] = False,
    weights: Annotated[
        str | None, _option(MODEL, "File of first weights, .safetensors or .pth; {arm} and {seed} are filled in.")
    ] = None,
    new_head: Annotated[
        bool, _option(MODEL, "Start the classifier of --weights anew, for other classes.", "--new-head")
    ] = False,
    arm: Annotated[
        list[str] | None,
        _option(
            ARMS,
            'NAME=METHODS, repeated: "plain=", "soft=soft,ratio=2", several methods with a plus between them. '
            "NAME@START=METHODS starts from the trained arm START, which has no methods, or from a file of weights "
            "({seed} is filled in).",
        ),
    ] = None,
    method: Annotated[
        list[str] | None, _option(ARMS, 'Methods of the only arm, repeated: "soft,ratio=2"; none for the plain model.')
    ] = None,
    seeds: Annotated[str, _option(ARMS, "Each arm is trained once per seed.")] = "0",
    epochs: Annotated[float | None, _option(TRAIN, "Passes over the training pictures; 10 by default.")] = None,
    steps: Annotated[int | None, _option(TRAIN, "Steps, instead of epochs.", min=1)] = None,
    batch_size: Annotated[int, _option(TRAIN, "Pictures of a step.", min=1)] = 128,
    lr: Annotated[float, _option(TRAIN, "Peak learning rate; a cosine takes it to a hundredth.")] = 1e-3,
    warmup: Annotated[float, _option(TRAIN, "Share of the steps in which the rate rises.")] = 0.1,
    optimizer: Annotated[str, _option(TRAIN, "Name of a timm optimizer.")] = "adamw",
    weight_decay: Annotated[float, _option(TRAIN, "Of all but biases and norms.")] = 0.05,
    label_smoothing: Annotated[float, _option(TRAIN, "Share of the target that all classes get.")] = 0.1,
    mixup: Annotated[float, _option(TRAIN, "timm's mixup alpha; 0 for none.")] = 0.0,
    cutmix: Annotated[float, _option(TRAIN, "timm's cutmix alpha; 0 for none.")] = 0.0,
    clip_grad: Annotated[float | None, _option(TRAIN, "Largest norm of the gradients.")] = None,
    amp: Annotated[bool, _option(TRAIN, "Multiply matrices in bfloat16.", "--amp")] = False,
    eval_every: Annotated[int | None, _option(TRAIN, "Steps between tests; an epoch by default.", min=1)] = None,
    start_from: Annotated[str | None, _option(START, "START of every arm that has methods and names no other.")] = None,
    finetune_epochs: Annotated[float | None, _option(START, "Their epochs; by default as the others.")] = None,
    finetune_steps: Annotated[int | None, _option(START, "Their steps, instead of epochs.", min=1)] = None,
    finetune_lr: Annotated[float | None, _option(START, "Their rate; by default as the others.")] = None,
    distill: Annotated[
        float, _option(START, "Share of the loss that is the divergence from the start's logits, 0 to 1.")
    ] = 0.0,
    distill_temperature: Annotated[float, _option(START, "Divides both logits.")] = 2.0,
    distill_features: Annotated[
        float, _option(START, "Weight of the squared error of the blocks' outputs, as a share of their mean square.")
    ] = 0.0,
    out: Annotated[Path, _option(RUN, "Folder of the results. Finished runs in it are not made again.")] = Path(
        "classification-results"
    ),
    eval_only: Annotated[bool, _option(RUN, "Test --weights or --pretrained, train nothing.", "--eval-only")] = False,
    device: Annotated[str | None, _option(RUN, "torch device; by default the accelerator, if there is one.")] = None,
    threads: Annotated[int | None, _option(RUN, "torch threads.", min=1)] = None,
) -> None:
    """Train or test timm models with and without vltok methods on your pictures, side by side.

    Prints a table and writes results.json, accuracy.png and, in runs/, every run with its weights. Nothing is
    downloaded unless --pretrained asks for it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        recipe = Recipe(
            epochs=10.0 if epochs is None and steps is None else epochs,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            warmup=warmup,
            optimizer=optimizer,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            clip_grad=clip_grad,
            amp=amp,
        )
        length = {"epochs": recipe.epochs, "steps": recipe.steps}
        if finetune_epochs is not None or finetune_steps is not None:
            length = {"epochs": finetune_epochs, "steps": finetune_steps}
        arms, numbers = plan_arms(arm or [], method or [], start_from), parse_seeds(seeds)
        spec = ModelSpec(model, parse_fields(model_kwargs), pretrained, new_head)
        if eval_only and not (pretrained or weights or all(each.start for each in arms)):
            raise ValueError("--eval-only tests trained weights: give --weights FILE or --pretrained")
        if new_head and (eval_only or not weights):
            raise ValueError("--new-head is for training on from --weights")
        pictures = open_data(data, test, trains=not eval_only, holdout=holdout)
        place = pick_device(device)
        with _progress() as progress:
            rows = {split: progress.add_task(f"decoding {split} pictures", total=None, note="") for split in SPLITS}
            task = prepare(
                spec,
                pictures,
                parse_augment(augment),
                place,
                amp=amp,
                side=input_size,
                crop_pct=crop_pct,
                drops=on_bad_image == FaultName.drop,
                workers=workers,
                memory=memory,
                advance=lambda split, count, total: progress.update(rows[split], advance=count, total=total),
            )
        about = {"classes": task.num_classes, "augment": asdict(task.augment), "preprocess": asdict(task.preprocess)}
        about |= {"test": pictures.test.fingerprint, "train": pictures.train and pictures.train.fingerprint}
        bench = Bench(
            arms,
            task,
            spec,
            weights,
            recipe,
            replace(recipe, **length, lr=finetune_lr or lr),
            Distillation(distill, distill_temperature, distill_features),
            eval_every,
            about | {"on_bad_image": on_bad_image.value},
            Records(out / "runs"),
        )
        runs = _evaluate(bench, numbers) if eval_only else _train(bench, numbers)
    except (VltokError, ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    _show(bench, runs, out, is_trained=not eval_only)


def _train(bench: Bench, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Make the missing runs; returns the records of all."""
    done = bench.finished(seeds)
    missing = bench.missing(seeds)
    if done:
        CONSOLE.print(f"{len(done)} finished runs in {bench.records.folder}, {len(missing)} to make", highlight=False)
    with _progress() as progress:
        total = progress.add_task("steps of all runs", total=sum(bench.steps(arm) for arm, _ in missing), note="")
        for arm, seed in missing:
            row = progress.add_task(f"{arm.name}, seed {seed}", total=bench.steps(arm), note="")

            def advance(note: str, row: Any = row) -> None:
                progress.advance(total)
                progress.update(row, advance=1, note=note)

            record = bench.train(arm, seed, advance)
            done[arm.name, seed] = record
            progress.remove_task(row)
            progress.console.print(
                f"{arm.name}, seed {seed}: top-1 {100 * record['top1']:.2f} % after {record['steps']} steps, "
                f"{record['images_per_second']:.0f} images/s, {record['seconds']:.0f} s",
                highlight=False,
            )
    return {arm.name: [done[arm.name, seed] for seed in seeds] for arm in bench.arms}


def _evaluate(bench: Bench, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Test all arms as they start."""
    with _progress() as progress:
        row = progress.add_task("testing", total=len(bench.arms) * len(seeds), note="")
        runs: dict[str, list[dict[str, Any]]] = {}
        for arm in bench.arms:
            for seed in seeds:
                runs.setdefault(arm.name, []).append(bench.evaluate(arm, seed))
                progress.advance(row)
    return runs


def _show(bench: Bench, runs: dict[str, list[dict[str, Any]]], out: Path, is_trained: bool) -> None:
    """Print the table and write the files."""
    rows = report.summarise(bench.arms, runs)
    name = "results" if is_trained else "evaluation"
    report.write(out / f"{name}.json", rows, runs)
    first = next(iter(runs.values()))[0]
    caption = f"{first['tested']:,} test pictures"
    caption += f", {len(bench.task.train):,} training pictures" if is_trained else ""
    dropped = {split: count for split, count in first["dropped"].items() if count}
    caption += "".join(f"; {count} {split} pictures could not be decoded" for split, count in dropped.items())
    caption += "; ± standard deviation over seeds" if len(next(iter(runs.values()))) > 1 else ""
    console = Console()
    Console(width=max(console.width, 120)).print(report.render(rows, bench.spec.name, caption))
    if is_trained:
        report.plot(bench.arms, runs, out / "accuracy.png")
    console.print(f"written to {out}", highlight=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=CONSOLE)


if __name__ == "__main__":
    app(prog_name="python -m eval.image_classification")
