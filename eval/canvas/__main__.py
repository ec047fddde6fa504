"""What fewer visual tokens do to a trained model, on unseen digits and photo regions: `python -m eval.canvas`.

Answers test questions unpruned, pruned and condensed; prints a table, writes it, draws it. With --stage-2 the rows are
keep ratios, and layers after which all visual tokens are dropped.
"""

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoProcessor, BatchFeature

import vltok
from eval import options
from eval.canvas import plots, stage2, table
from eval.canvas.data import load_items
from eval.canvas.model import MODEL_DIR
from eval.canvas.runner import ADAPTERS, METHODS, Case, Result, cases, encode, kept_patches, time_prefill
from eval.canvas.workers import Bench, Plan, run_cases

TIMING_BATCH = 8
SHOWN_CANVASES = range(6)


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the questions, and show what came out."""
    started = time.perf_counter()
    given = _options(argv)
    plan = Plan(given.model, given.dtype, given.device, given.items, given.seed, given.questions, given.batch_size)
    bench = Bench(plan)
    ratios = sorted(set(given.keep_ratios), reverse=True)
    num_layers = bench.model.config.text_config.num_hidden_layers
    if given.stage_2:
        chosen = stage2.cases([1.0, *ratios], num_layers)
    else:
        chosen = cases(ratios, given.seed, ADAPTERS if given.model == MODEL_DIR else None, given.all)
    jobs = given.jobs or (min(4, os.cpu_count() or 1) if given.device == "cpu" else 1)
    with tqdm(total=len(bench.questions) * len(chosen), desc="answering questions", mininterval=1) as bar:
        results = run_cases(bench, chosen, jobs, bar.update)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = _settings(bench, jobs)
    if given.stage_2:
        rows = stage2.records(results)
        table.write(rows, settings, given.out, "stage2")
        plots.plot_depth(rows, given.out / "stage2.png", stage2.TAU, stage2.default_layer(num_layers))
        print(stage2.render(rows).text())
    else:
        _time(bench, results, given.rounds)
        rows = table.records(results)
        table.write(rows, settings, given.out)
        _draw(bench, results, rows, min(ratios, key=lambda ratio: abs(ratio - 0.1)), given.out)
        print(table.render(rows).text())
    seconds = time.perf_counter() - started
    print(f"{len(bench.questions)} questions x {len(chosen)} rows in {seconds:.0f} s; written to {given.out}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mode without a choice of its own of keep ratios gets one."""
    names = ("device", "dtype", "rounds", "quick", "out")
    defaults = {"rounds": 5, "quick": "fewer questions and rounds, two keep ratios", "out": Path("canvas-results")}
    command = options.parser(__doc__, options.common(*names, **defaults))
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--all", action="store_true", help="every method, and the switches of selectors")
    mode.add_argument("--stage-2", action="store_true", help="ToDRE's second stage over depth, not the table")
    command.add_argument(
        "--items", type=Path, help="other item pictures, .npz: images (N, h, w) uint8, labels (N,), optional names"
    )
    command.add_argument(
        "--questions",
        type=options.count,
        default=1000,
        help="at least so many with answers of one word; boxes and readings of their pictures besides (%(default)s)",
    )
    command.add_argument("--keep-ratios", type=options.shares, help="shares of the 256 visual tokens, with commas")
    command.add_argument("--batch-size", type=options.count, default=8, help="questions per batch (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the canvases and of random pruning (%(default)s)")
    command.add_argument("--jobs", type=options.count, help="processes (one per core, at most 4; 1 on a GPU)")
    command.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the trained model")
    given = options.parse(command, argv, quick={"questions": 100, "rounds": 2})
    if given.keep_ratios is None:
        given.keep_ratios = [0.1] if given.stage_2 else [0.25, 0.1] if given.quick else [0.5, 0.25, 0.1, 0.05]
    if given.items is not None:
        known = AutoProcessor.from_pretrained(given.model, local_files_only=True).tokenizer.get_vocab()
        if unknown := [name for name in load_items(given.items).names if name not in known]:
            command.error(
                f"--items: the model in {given.model} does not know the item names {', '.join(unknown)}; "
                "train one on these items with python -m eval.canvas.train --items"
            )
    return given


def _time(bench: Bench, results: list[Result], rounds: int) -> None:
    """Note the time of the prefill of each case that isn't the model as it is."""
    changed = [result for result in results if not result.case.is_plain]
    others = [(result.case, _first_batch(bench, result.case)) for result in changed]
    plain = _first_batch(bench, results[0].case)
    for result, ratio in zip(changed, time_prefill(bench.model, bench.processor, plain, others, rounds), strict=True):
        result.prefill_ratio = ratio


def _settings(bench: Bench, jobs: int) -> dict[str, object]:
    """What the numbers hang on."""
    plan = bench.plan
    return {
        "questions": len(bench.questions),
        "canvases": len({question.canvas for question in bench.questions}),
        "kinds": list(bench.canvases.kinds),
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


if __name__ == "__main__":
    main()
