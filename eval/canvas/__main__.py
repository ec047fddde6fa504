"""`python -m eval.canvas`: what fewer visual tokens do to a trained model, on unseen digits and photo regions."""

import os
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoProcessor, BatchFeature

import vltok
from eval.canvas import plots, stage2, table
from eval.canvas.data import load_items
from eval.canvas.model import MODEL_DIR
from eval.canvas.pool import Bench, Plan, run_cases
from eval.canvas.runner import ADAPTERS, METHODS, Case, Result, cases, encode, kept_patches, time_prefill

TIMING_BATCH = 8
SHOWN_CANVASES = range(6)
QUICK = {"questions": 100, "keep_ratios": "0.25,0.1", "rounds": 2}
FULL = {"questions": 1000, "keep_ratios": "0.5,0.25,0.1,0.05", "rounds": 5}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions, two keep ratios: under a minute.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every method, and the switches of selectors.")] = False,
    stage_2: Annotated[
        bool,
        typer.Option("--stage-2", help="ToDRE's second stage over the decoder's depth, not the table."),
    ] = False,
    items: Annotated[
        Path | None,
        typer.Option(help="Other item pictures, .npz: images (N, h, w) uint8, labels (N,), optional names."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results as JSON and CSV, and the pictures.")] = Path(
        "canvas-results"
    ),
    questions: Annotated[int | None, typer.Option(min=1, help="At least this many; 1000, with --quick 100.")] = None,
    keep_ratios: Annotated[str | None, typer.Option(help="Shares of the 256 visual tokens, with commas.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the canvases and of random pruning.")] = 0,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one per core, at most 4, 1 on a GPU.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = MODEL_DIR,
) -> None:
    """Answer test questions unpruned, pruned and condensed; print a table, write it, draw it.

    With --stage-2 the rows are keep ratios, and layers after which all visual tokens are dropped.
    """
    started = time.perf_counter()
    mode = QUICK if quick else FULL
    if stage_2 and every:
        raise typer.BadParameter("adds rows to the table, which --stage-2 leaves out; give one", param_hint="--all")
    ratios = _parse_ratios(keep_ratios or ("0.1" if stage_2 else mode["keep_ratios"]))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    plan = Plan(model, dtype, device, items, seed, questions or mode["questions"], batch_size)
    _check_items(plan)
    bench = Bench(plan)
    num_layers = bench.model.config.text_config.num_hidden_layers
    if stage_2:
        chosen = stage2.cases([1.0, *ratios], num_layers)
    else:
        chosen = cases(ratios, seed, ADAPTERS if model == MODEL_DIR else None, every)
    out.mkdir(parents=True, exist_ok=True)

    jobs = jobs or _default_jobs(device)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        answering = progress.add_task("answering questions", total=len(bench.questions) * len(chosen))
        results = run_cases(bench, chosen, jobs, lambda count: progress.advance(answering, count))
        if not stage_2:
            _time(bench, results, mode["rounds"], progress)

    settings = _settings(bench, jobs)
    console = Console()
    wide = Console(width=max(console.width, 180))
    if stage_2:
        rows = stage2.records(results)
        table.write(rows, settings, out, "stage2")
        plots.plot_depth(rows, out / "stage2.png", stage2.TAU, stage2.default_layer(num_layers))
        wide.print(stage2.render(rows))
    else:
        rows = table.records(results)
        table.write(rows, settings, out)
        _draw(bench, results, rows, min(ratios, key=lambda ratio: abs(ratio - 0.1)), out)
        wide.print(table.render(rows))
        console.print(table.stage2_note(rows), highlight=False)
    seconds = time.perf_counter() - started
    console.print(
        f"{len(bench.questions)} questions x {len(chosen)} rows in {seconds:.0f} s; written to {out}", highlight=False
    )


def _time(bench: Bench, results: list[Result], rounds: int, progress: Progress) -> None:
    """Note the time of the prefill of each case that isn't the model as it is."""
    changed = [result for result in results if not result.case.is_plain]
    timing = progress.add_task("timing the prefill", total=len(changed) * rounds)
    ratios = time_prefill(
        bench.model,
        bench.processor,
        _first_batch(bench, results[0].case),
        [(result.case, _first_batch(bench, result.case)) for result in changed],
        rounds,
        lambda count: progress.advance(timing, count),
    )
    for result, ratio in zip(changed, ratios, strict=True):
        result.prefill_ratio = ratio


def _settings(bench: Bench, jobs: int) -> dict[str, object]:
    """What the numbers hang on."""
    plan = bench.plan
    return {
        "questions": len(bench.questions),
        "canvases": len({question.canvas for question in bench.questions}),
        "split": "test",
        "seed": plan.seed,
        "items": "scikit-learn digits" if plan.items is None else plan.items.name,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "dtype": plan.dtype,
        "positions": "keep",
        "jobs": jobs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vltok": vltok.__version__,
        "processor": platform.machine(),
    }


def _draw(bench: Bench, results: list[Result], rows: list[dict[str, object]], shown_ratio: float, out: Path) -> None:
    """Accuracy against tokens and time, and what selectors keep at one ratio."""
    plots.plot_accuracy(rows, out / "accuracy.png")
    plots.plot_accuracy(rows, out / "time.png", along="prefill_ratio")
    selectors = [result.case for result in results if not result.case.is_plain and not result.case.condenses]
    _draw_kept(bench, [case for case in selectors if case.keep_ratio == shown_ratio], out / "kept.png")


def _first_batch(bench: Bench, case: Case) -> BatchFeature:
    """The first few questions, encoded for a case, in one batch."""
    with case.put_on(bench.model, bench.processor):
        first = bench.questions[:TIMING_BATCH]
        return encode(bench.processor, bench.canvases, first, TIMING_BATCH, wrong_image=False)[0]


def _draw_kept(bench: Bench, pruned: list[Case], path: Path) -> None:
    """Overlay what each selector keeps of the first test pictures; ToDRE's stage 2 keeps what stage 1 does."""
    questions = [bench.canvases.questions(index)[0] for index in SHOWN_CANVASES]
    batch = encode(bench.processor, bench.canvases, questions, len(questions), wrong_image=False)[0]
    images = [bench.canvases.canvas(index).image for index in SHOWN_CANVASES]
    one_stage = [case for case in pruned if case.name in METHODS and case.name != "ToDRE, stages 1+2"]
    kept = {case.name.removesuffix(", stage 1"): kept_patches(bench.model, case, batch) for case in one_stage}
    number = len(next(iter(kept.values()))[0])
    plots.plot_kept(images, kept, path, f"The {number} of 256 patches that each method keeps")


def _default_jobs(device: str) -> int:
    return min(4, os.cpu_count() or 1) if device == "cpu" else 1


def _check_items(plan: Plan) -> None:
    """Refuse item names that are no words of the model's tokenizer."""
    if plan.items is None:
        return
    known = AutoProcessor.from_pretrained(plan.model, local_files_only=True).tokenizer.get_vocab()
    unknown = [name for name in load_items(plan.items).names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"the model in {plan.model} does not know the item names {', '.join(unknown)}; "
            "train one on these items with python -m eval.canvas.train --items",
            param_hint="--items",
        )


def _parse_ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise typer.BadParameter(f"must be numbers in (0, 1) with commas, got {text!r}", param_hint="--keep-ratios")
    return sorted(set(ratios), reverse=True)


if __name__ == "__main__":
    typer.run(main)
