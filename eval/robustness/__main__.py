"""`python -m eval.robustness`: image classifiers on corrupted, unusual and slightly moving pictures.

Corrupted pictures are made once for all models that are tested together; what they look like depends on the seed, the
number of the picture, the corruption and its severity alone. Every result is kept on disk as soon as it is there, so
that the command can be stopped and started again.

The corruptions have the strengths of ImageNet-C, made for pictures of 224 x 224. At 32 x 32 they are far harsher than
those of CIFAR-C: errors of small pictures compare the arms with each other, not with published figures.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console

from eval.image_classification.data import Data, open_data
from eval.image_classification.models import ModelSpec
from eval.image_classification.settings import parse_fields, parse_seeds, pick_device
from eval.robustness import bench, plots, report
from eval.robustness.classes import output_names, read_classes
from eval.robustness.classifiers import Classifiers, HuggingFaceClassifiers, TimmClassifiers
from eval.robustness.contenders import plan_contenders
from eval.robustness.corruptions import parse_corruptions, parse_severities
from eval.robustness.parts import plan_parts
from eval.robustness.progress import Watch
from eval.robustness.setup import ClassifierSetup, FaultName
from vltok.errors import VltokError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DATA, CORRUPT, MODEL, ARMS, RUN = "Pictures", "Corruptions", "Model", "Arms: what is compared", "Run"
EXAMPLES = """\
What eval.image_classification trained into the folder trained, three seeds of each arm, on 1000 test pictures:

--data cifar.npz --model vit_tiny_patch16_224 --model-kwargs img_size=32,patch_size=4,depth=4
--arm plain= --arm tap=tap --arm adl=adl --arm both=tap+adl --seeds 0,1,2
--weights "trained/runs/{arm}-seed{seed}.safetensors" --limit 1000

A published model on the published folders:

--model deit_small_patch16_224 --pretrained --data imagenet/val --imagenet-c imagenet-c --imagenet-p imagenet-p
--subset imagenet-a=imagenet-a --subset imagenet-r=imagenet-r --workers 8
"""


class WhereName(StrEnum):
    """What is corrupted."""

    input = "input"
    picture = "picture"


def _option(group: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, **limits)


@app.command(epilog=EXAMPLES)
def main(
    *,
    data: Annotated[
        Path | None,
        _option(
            DATA,
            "Clean pictures: a folder with a subfolder per class, or one with val/ or test/ in it; or an npz file as "
            "eval.image_classification takes them. Without --imagenet-c they are also corrupted.",
        ),
    ] = None,
    imagenet_c: Annotated[
        Path | None,
        _option(DATA, "Folder of corrupted pictures, CORRUPTION/SEVERITY/CLASS/FILE.", "--imagenet-c"),
    ] = None,
    subset: Annotated[
        list[str] | None,
        _option(
            DATA,
            "NAME=FOLDER, repeated, for pictures of some of the classes, such as ImageNet-A and -R: answers are chosen "
            "among the classes that have a subfolder there.",
        ),
    ] = None,
    imagenet_p: Annotated[
        Path | None,
        _option(
            DATA,
            "Folder of sequences, PERTURBATION/CLASS/SEQUENCE, each a video or a folder of frames. Counts how often "
            "the answer changes, from the first frame for noise, else from the frame before.",
            "--imagenet-p",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        _option(
            DATA,
            "Names of the model's outputs in order: a file with one per line, or a folder whose subfolders they are, "
            "such as ImageNet's val/. By default those of --data, if there are as many, or ImageNet's wnids for 1000.",
        ),
    ] = None,
    limit: Annotated[
        int | None, _option(DATA, "Look at so many pictures of each source, spread evenly over it.", min=1)
    ] = None,
    on_bad_image: Annotated[
        FaultName, _option(DATA, "For pictures that can't be decoded; skipped ones are counted.")
    ] = FaultName.stop,
    corruptions: Annotated[
        str, _option(CORRUPT, '"all" 15 of ImageNet-C, "none", or names with commas between them.')
    ] = "all",
    severities: Annotated[str, _option(CORRUPT, "Of each, 1 to 5. mCE is defined by all of them.")] = "1,2,3,4,5",
    corrupt: Annotated[
        WhereName,
        _option(
            CORRUPT,
            "Corrupt the model's input, cropped and resized, as ImageNet-C was made; or the picture before that. The "
            "strengths are those for 224 x 224: at 32 x 32 they are far harsher than CIFAR-C.",
        ),
    ] = WhereName.input,
    corruption_seed: Annotated[int, _option(CORRUPT, "Of all that is random in corruptions.", min=0)] = 0,
    model: Annotated[
        str,
        _option(
            MODEL,
            "Name of a timm model; or a folder that save_pretrained of a Hugging Face image classifier wrote, with its "
            "image processor; or the name of one in the local cache.",
        ),
    ],
    model_kwargs: Annotated[
        str, _option(MODEL, 'For timm.create_model: "img_size=32,patch_size=4,depth=4", say.')
    ] = "",
    pretrained: Annotated[
        bool, _option(MODEL, "Fetch published weights. Nothing else is ever downloaded.", "--pretrained")
    ] = False,
    weights: Annotated[
        str | None,
        _option(MODEL, "File of weights, .safetensors or .pth, for arms that name none; {arm}, {seed} are filled in."),
    ] = None,
    crop_pct: Annotated[
        float | None,
        _option(
            MODEL,
            "Share of a picture's side that is looked at. By default timm's for the model, and all of pictures that "
            "are no larger than its input.",
            min=0.1,
            max=1.0,
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        _option(
            ARMS,
            'NAME=METHODS, repeated: "plain=", "tap=tap", several methods with a plus between them. NAME@FILE=METHODS '
            "has trained weights, with those of the methods or without; {seed} is filled in. NAME@FOLDER= has what "
            "vltok.save wrote.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None, _option(ARMS, 'Methods of the only arm, repeated: "tap,num_scales=2"; none: the plain model.')
    ] = None,
    seeds: Annotated[str, _option(ARMS, "Which trained models of each arm, for {seed} in the names of weights.")] = "0",
    out: Annotated[Path, _option(RUN, "Folder of the results. Finished ones in it are not made again.")] = Path(
        "robustness-results"
    ),
    batch_size: Annotated[int, _option(RUN, "Pictures that go through a model together.", min=1)] = 64,
    workers: Annotated[int, _option(RUN, "Processes that decode and corrupt; 0 does so in this one.", min=0)] = 0,
    models_at_once: Annotated[
        int, _option(RUN, "Models held in memory, for which a corrupted picture is made once.", min=1)
    ] = 16,
    amp: Annotated[bool, _option(RUN, "Multiply matrices in bfloat16.", "--amp")] = False,
    device: Annotated[str | None, _option(RUN, "torch device; by default the accelerator, if there is one.")] = None,
    threads: Annotated[int | None, _option(RUN, "torch threads.", min=1)] = None,
) -> None:
    """Test classifiers with and without vltok methods on corrupted, unusual and slightly moving pictures.

    Prints tables and writes results.json, corruptions.png and, in runs/, every model's results.
    mCE and mFR are given where all that they are made of was measured.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        clean = open_data(data, trains=False) if data is not None else None
        classifiers, names = _classifiers(model, model_kwargs, pretrained, crop_pct, classes, clean)
        setup = ClassifierSetup(
            classifiers=classifiers,
            names=names,
            device=pick_device(device),
            amp=amp,
            batch_size=batch_size,
            workers=workers,
            limit=limit,
            skips=on_bad_image == FaultName.skip,
            seed=corruption_seed,
            corrupts_input=corrupt == WhereName.input,
        )
        has_own = pretrained or isinstance(classifiers, HuggingFaceClassifiers)
        contenders = plan_contenders(arm or [], method or [], weights, parse_seeds(seeds), has_own)
        parts = plan_parts(
            setup,
            None if clean is None else clean.test,
            parse_corruptions(corruptions),
            parse_severities(severities),
            imagenet_c=imagenet_c,
            subsets=subset or [],
            imagenet_p=imagenet_p,
        )
        total = len(contenders) * sum(len(part.cells) for part in parts)
        with Watch(total) as watch:
            results = bench.run(
                contenders,
                parts,
                setup,
                out / "runs",
                at_once=models_at_once,
                begin=watch.begin,
                advance=watch.advance,
                done=watch.done,
            )
    except (VltokError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    arms = list({each.arm.name: each.arm for each in contenders}.values())
    rows = report.summarise(arms, results)
    report.write(out / "results.json", rows, results)
    _show(rows, model, out, _caption(results, setup))


def _classifiers(
    model: str, kwargs: str, pretrained: bool, crop_pct: float | None, classes: Path | None, clean: Data | None
) -> tuple[Classifiers, list[str] | None]:
    """The architecture, and the names of its outputs if anybody knows them."""
    given = read_classes(classes) if classes is not None else None
    of_data = clean.test.classes if clean is not None else None
    if Path(model).is_dir() or ("/" in model and ":" not in model):  # timm's hub names have a colon
        if kwargs:
            raise ValueError("--model-kwargs are for timm models")
        classifiers: Classifiers = HuggingFaceClassifiers(model, pretrained, crop_pct)
        if given is None and classifiers.num_outputs != 1000:  # ImageNet's are words there, in folders they are wnids
            given = classifiers.class_names
    else:
        if pretrained:
            count = getattr(timm.get_pretrained_cfg(model, allow_unregistered=True), "num_classes", 1000)
        elif given is not None:
            count = len(given)
        else:
            count = 1000 if clean is None else clean.num_classes
        classifiers = TimmClassifiers(ModelSpec(model, parse_fields(kwargs), pretrained), count, crop_pct)
    return classifiers, output_names(classifiers.num_outputs, given, of_data)


def _caption(results: bench.Results, setup: ClassifierSetup) -> str:
    """What was looked at, and what could not be."""
    first = next(iter(results.values()))[0]["cells"]
    parts = [f"{first['clean']['tested']:,} clean pictures"] if "clean" in first else []
    if any(name.startswith("corruption/") for name in first):
        severities = {name.split("/")[2] for name in first if name.startswith("corruption/")}
        parts.append(f"severities {', '.join(sorted(severities))}, seed {setup.seed}")
    parts += ["± standard deviation over seeds"] if len(next(iter(results.values()))) > 1 else []
    skipped = max(figures["skipped"] for figures in first.values())
    parts += [f"up to {skipped:,} pictures or sequences of a result could not be decoded"] if skipped else []
    return "; ".join(parts)


def _show(rows: list[report.Row], model: str, out: Path, caption: str) -> None:
    """Print the tables and draw the picture."""
    console = Console()
    wide = Console(width=max(console.width, 120))
    for table in (report.render_errors(rows), report.render_flips(rows)):
        if table is not None:
            wide.print(table)
    if rows[0]["by_corruption"]:
        plots.plot(rows, out / "corruptions.png")
    wide.print(report.render(rows, model))
    wide.print(caption, highlight=False)
    if rows[0]["by_corruption"] and not rows[0]["mce"]:
        console.print("no mCE: it is defined by all 15 corruptions at all 5 severities", highlight=False)
    if rows[0]["flip_rates"] and not rows[0]["mfr"]:
        console.print("no mFR: it is defined by all 10 perturbations of ImageNet-P", highlight=False)
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m eval.robustness")
