"""`python -m eval.benchmarks`: public benchmarks with and without methods, at equal cost, by lmms-eval.

    python -m eval.benchmarks --model llava-hf/llava-1.5-7b-hf --methods divprune,todre --keep 0.22,0.11 --tasks text

Rows are the unpruned model, and at each budget smaller images, pooled, random and evenly spaced tokens, and the
methods. A row on a task is a cell; finished cells are on disk, so that the command can be stopped and started again. It
also runs under `accelerate launch`, one model on every device.
"""

import sys
import traceback
from pathlib import Path
from typing import Any

from accelerate import PartialState

from eval import options
from eval.benchmarks import compare, hard, plots, table
from eval.benchmarks.plan import Row, fingerprint, plan_rows
from eval.benchmarks.results import summarise
from eval.benchmarks.runner import CellError, run
from eval.benchmarks.scores import TASK_SETS, parse_tasks
from eval.store import Store
from vltok.errors import VltokError


def parser() -> options.argparse.ArgumentParser:
    """The command line."""
    command = options.parser(__doc__, options.common("out", out=Path("benchmark-results")))
    add = command.add_argument
    add("--model", required=True, help="folder of a model and its processor, or the id of one")
    add("--methods", default="divprune,todre", help="commas between them, settings behind semicolons (%(default)s)")
    add("--keep", type=options.shares, default="0.2,0.1,0.05", help="shares of the visual tokens (%(default)s)")
    add("--tasks", default="core", help=f"sets ({', '.join(TASK_SETS)}) or tasks of lmms-eval (%(default)s)")
    add("--limit", type=options.count, help="samples of each task; all by default")
    add("--batch-size", type=options.count, default=1, help="prompts that are answered together (%(default)s)")
    add("--include-path", type=Path, help="folder with more tasks")
    add("--backend", default="vltok", help="which of vltok's models in lmms-eval, for its defaults (%(default)s)")
    add("--model-args", default="", help="more of its arguments: dtype=bfloat16,max_pixels=602112")
    add("--device", help="torch device; by default the first GPU where there is one")
    add("--hard-subset", action="store_true", help="also count only samples that resizing to equal cost gets wrong")
    add("--published-as", help="model whose published figures are shown; by default the one --model names")
    return command


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for, and print and write tables and pictures; returns the exit code."""
    given = options.parse(parser(), argv)
    try:
        _run(given)
    except CellError as error:
        traceback.print_exception(error.__cause__)
        print(f"error: {error}; finished cells are in {given.out}", file=sys.stderr)
        return 1
    except (VltokError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(given: options.argparse.Namespace) -> None:
    rows, names = plan_rows(given.methods, given.keep), parse_tasks(given.tasks)
    try:
        from eval.benchmarks.harness import Bench, Setup, Tasks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}; benchmarks are run by lmms-eval: pip install "vltok[lmms,eval]"'
        ) from error
    setup = Setup(given.model, given.backend, given.model_args, given.limit, given.batch_size, given.device)
    tasks = Tasks(names, given.backend, given.include_path)
    columns = tasks.columns
    bench = Bench(setup, tasks, given.out)
    rows, notes = _possible(bench, rows)
    if given.hard_subset and not any(row.shrinks for row in rows):
        raise ValueError(f"--hard-subset compares with resized images. {notes[0]}")
    leaves = dict.fromkeys(leaf for own in columns.values() for leaf in own)
    settings = setup.settings(fingerprint(given.model))
    store = Store(given.out / "cells")
    cells, refused = run(bench, rows, {leaf: tasks.settings(leaf) for leaf in leaves}, settings, store)
    if PartialState().is_main_process:
        _report(given, cells, columns, settings | {"dtype": bench.dtype}, notes + refused)


def _possible(bench: Any, rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows that the model can have, and why it can't have some floors.

    Raises:
        ValueError: If it can't have one of the methods that were asked for.
    """
    refusals = {row: bench.refusal(row) for row in rows}
    asked = [f"{row.label}: {why}" for row, why in refusals.items() if why and not row.is_floor]
    if asked:
        raise ValueError("; ".join(asked))
    notes = dict.fromkeys(f"No row for {row.name}: {why}" for row, why in refusals.items() if why)
    return [row for row, why in refusals.items() if why is None], list(notes)


def _report(
    given: options.argparse.Namespace,
    cells: dict[Row, Any],
    columns: dict[str, list[str]],
    settings: dict[str, Any],
    notes: list[str],
) -> None:
    """Print and write everything."""
    records = summarise(cells, columns)
    if given.limit is not None:
        notes = [f"Only the first {given.limit} samples of each task.", *notes]
    content: dict[str, Any] = {"settings": settings, "notes": notes}
    tables = [table.render(records, notes)]
    if given.hard_subset:
        content["hard"] = hard.hard_records(cells, columns)
        tables.append(table.render_hard(content["hard"]))
    facts = {"model": given.published_as or given.model, "dtype": settings["dtype"], "limit": given.limit}
    content["published"] = compare.compare(compare.read_published(), list(cells), records, facts)
    if content["published"]:
        tables.append(compare.render(content["published"]))
    table.write(given.out, "results", content, records, tables)
    plots.plot_tasks(records, given.out)
    print("\n".join(each.text() for each in tables))
    print(f"written to {given.out}: results.json, results.csv, results.md and a picture for each task")


if __name__ == "__main__":
    sys.exit(main())
