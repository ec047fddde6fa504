"""`python -m eval.segmentation`: mean intersection over union of Hugging Face models, on clean and corrupted pictures.

Corruptions are those of eval.robustness, made of the pictures at their full size, once for all models. Every result is
kept on disk as soon as it is there, so that the command can be stopped and started again.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from eval.image_classification.settings import pick_device
from eval.robustness import bench, plots
from eval.robustness.classifiers import read_pretrained
from eval.robustness.corruptions import corruption_cells, parse_corruptions, parse_severities
from eval.robustness.progress import Watch
from eval.robustness.report import render_errors, write
from eval.robustness.setup import FaultName, Setup
from eval.segmentation import report
from eval.segmentation.layouts import Pairs, find_pairs
from eval.segmentation.masks import Masks
from eval.segmentation.models import Segmenter, plan_segmenters

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DATA, CORRUPT, MODEL, RUN = "Pictures", "Corruptions", "Models", "Run"
EXAMPLES = """\
Two models on the validation pictures of Cityscapes, clean and corrupted:

--data cityscapes --model b0=segformer-b0 --model b5=segformer-b5 --workers 8

--data acdc --model segformer-b5 --corruptions none
"""


def _option(group: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, **limits)


@app.command(epilog=EXAMPLES)
def main(
    *,
    data: Annotated[
        Path,
        _option(
            DATA,
            "Folder with images/ and masks/ whose files have the same names; or Cityscapes with leftImg8bit/ and "
            "gtFine/; or ACDC with rgb_anon/ and gt/. In masks 255 is left out.",
        ),
    ],
    layout: Annotated[str, _option(DATA, '"folder", "cityscapes", "acdc", or "auto" for what is there.')] = "auto",
    split: Annotated[str, _option(DATA, "Of Cityscapes and ACDC.")] = "val",
    reduce_labels: Annotated[
        bool | None,
        _option(
            DATA,
            "Whether 0 in masks is no class and the others count from 1, as in ADE20K. By default as the models' image "
            "processors say for images/ and masks/, and never for the others.",
            "--reduce-labels/--no-reduce-labels",
        ),
    ] = None,
    limit: Annotated[int | None, _option(DATA, "Look at so many pictures, spread evenly over all.", min=1)] = None,
    on_bad_image: Annotated[
        FaultName, _option(DATA, "For pictures and masks that can't be decoded; skipped ones are counted.")
    ] = FaultName.stop,
    corruptions: Annotated[
        str, _option(CORRUPT, '"all" 15 of ImageNet-C, "none", or names with commas between them.')
    ] = "all",
    severities: Annotated[str, _option(CORRUPT, "Of each, 1 to 5.")] = "1,2,3,4,5",
    corruption_seed: Annotated[int, _option(CORRUPT, "Of all that is random in corruptions.", min=0)] = 0,
    model: Annotated[
        list[str],
        _option(
            MODEL,
            "NAME=FOLDER or FOLDER, repeated: what save_pretrained of a Hugging Face model for semantic segmentation "
            "wrote, with its image processor. Nothing is downloaded.",
        ),
    ],
    resize: Annotated[
        bool,
        _option(
            MODEL,
            "Bring pictures to the size of the image processor, or give them to the model as they are. Answers are "
            "always compared at the size of the mask.",
            "--resize/--no-resize",
        ),
    ] = True,
    out: Annotated[Path, _option(RUN, "Folder of the results. Finished ones in it are not made again.")] = Path(
        "segmentation-results"
    ),
    workers: Annotated[int, _option(RUN, "Processes that decode and corrupt; 0 does so in this one.", min=0)] = 0,
    models_at_once: Annotated[
        int, _option(RUN, "Models held in memory, for which a corrupted picture is made once.", min=1)
    ] = 16,
    amp: Annotated[bool, _option(RUN, "Multiply matrices in bfloat16.", "--amp")] = False,
    device: Annotated[str | None, _option(RUN, "torch device; by default the accelerator, if there is one.")] = None,
    threads: Annotated[int | None, _option(RUN, "torch threads.", min=1)] = None,
) -> None:
    """Test semantic segmentation on clean and corrupted pictures.

    Prints tables and writes results.json, corruptions.png and, in runs/, every model's results.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        setup = Setup(
            device=pick_device(device),
            amp=amp,
            workers=workers,
            limit=limit,
            skips=on_bad_image == FaultName.skip,
            seed=corruption_seed,
        )
        segmenters = plan_segmenters(model, resize)
        found = find_pairs(data, layout, split)
        _check_classes(segmenters, found)
        names, levels = parse_corruptions(corruptions), parse_severities(severities)
        cells = {"clean": (None, 0)} | corruption_cells(names, levels)
        part = Masks(data, found, cells, setup, reduces=_reduces(reduce_labels, segmenters, found))
        with Watch(len(segmenters) * len(cells)) as watch:
            results = bench.run(
                segmenters,
                [part],
                setup,
                out / "runs",
                at_once=models_at_once,
                begin=watch.begin,
                advance=watch.advance,
                done=watch.done,
            )
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    rows = report.summarise(results, found.classes)
    write(out / "results.json", rows, results)
    first = next(iter(results.values()))[0]["cells"]
    caption = f"{first['clean']['tested']:,} pictures, layout {found.layout}"
    caption += f"; corruption seed {corruption_seed}" if names else ""
    skipped = max(figures["skipped"] for figures in first.values())
    caption += f"; up to {skipped:,} pictures of a result could not be decoded" if skipped else ""
    _show(rows, out, caption)


def _check_classes(segmenters: list[Segmenter], found: Pairs) -> None:
    """Raise a ValueError if a model hasn't the classes of the layout."""
    for each in segmenters:
        config = read_pretrained(transformers.AutoConfig, each.folder, {"local_files_only": True})
        if found.classes is not None and config.num_labels != len(found.classes):
            raise ValueError(
                f"{each.folder} has {config.num_labels} classes; {found.layout} is tested with {len(found.classes)}"
            )


def _reduces(option: bool | None, segmenters: list[Segmenter], found: Pairs) -> bool:
    """Whether 0 in a mask is no class."""
    if option is not None or found.layout != "folder":
        return bool(option)
    said = {bool(getattr(each.processor(), "do_reduce_labels", False)) for each in segmenters}
    if len(said) > 1:
        raise ValueError("the models' image processors differ in do_reduce_labels: say --reduce-labels or not")
    return said.pop()


def _show(rows: list[dict[str, Any]], out: Path, caption: str) -> None:
    """Print the tables and draw the picture."""
    console = Console()
    wide = Console(width=max(console.width, 120))
    wide.print(report.render_classes(rows))
    if (table := render_errors(rows, "mIoU % of corrupted pictures")) is not None:
        wide.print(table)
        plots.plot(rows, out / "corruptions.png", "mIoU, %", clean="clean")
    wide.print(report.render(rows))
    wide.print(caption, highlight=False)
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m eval.segmentation")
