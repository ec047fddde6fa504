"""Spread an evaluation over processes: with a model this small, one thread in each of two beats two threads in one."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import BatchFeature

from eval.canvas.data import Canvases, load_items
from eval.canvas.model import load
from eval.canvas.runner import Case, Result, draw_questions, encode, evaluate

CHUNK = 12  # batches per task: small enough that the progress bar moves


@dataclass(frozen=True)
class Plan:
    """What a process needs to answer the same questions as any other: all values are plain, so it can be sent."""

    model: Path
    dtype: str
    device: str
    items: Path | None
    seed: int
    questions: int
    batch_size: int


class Bench:
    """The model, its processor and the questions of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.processor = load(plan.model, getattr(torch, plan.dtype), plan.device)
        self.canvases = Canvases("test", plan.seed, None if plan.items is None else load_items(plan.items))
        self.questions = draw_questions(self.canvases, plan.questions)
        self._encoded: dict[tuple[int, bool], list[BatchFeature]] = {}

    def chunks(self) -> range:
        """First question of each chunk."""
        return range(0, len(self.questions), CHUNK * self.plan.batch_size)

    def run(self, case: Case, start: int) -> Result:
        """Answer one chunk under one case."""
        questions = self.questions[start : start + CHUNK * self.plan.batch_size]
        key = (start, case.wrong_image)
        if key not in self._encoded:
            self._encoded[key] = encode(
                self.processor, self.canvases, questions, self.plan.batch_size, case.wrong_image
            )
        return evaluate(self.model, self.processor, case, self._encoded[key], questions)


def run_cases(bench: Bench, every: Sequence[Case], jobs: int, advance: Callable[[Case, int], None]) -> list[Result]:
    """Answer all questions under every case.

    Args:
        bench: Used as it is for one job; its plan is sent to the processes of several.
        every: The cases; results come in this order and do not depend on `jobs`.
        jobs: Processes. Each gets its share of the cores as torch threads.
        advance: Called after each chunk with its case and its number of questions.
    """
    results = [Result(case) for case in every]
    if jobs == 1:
        for result in results:
            for start in bench.chunks():
                part = bench.run(result.case, start)
                result.add(part)
                advance(part.case, part.total)
        return results
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        # glibc of the new processes keeps freed memory: fresh pages for every activation cost a tenth of the time.
        os.environ.setdefault(name, str(2**32))
    # spawn: a forked process would inherit torch's threads in an unusable state.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_process, (threads,)) as pool:
        tasks: dict[Future[Result], Result] = {}
        for start in bench.chunks():
            tasks |= {pool.submit(_run_in_process, bench.plan, r.case, start): r for r in results}
        for task in as_completed(tasks):
            part = task.result()
            tasks[task].add(part)
            advance(part.case, part.total)
    return results


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # sharp softmaxes underflow, and products of denormals are slow


@lru_cache(maxsize=1)
def _bench(plan: Plan) -> Bench:
    return Bench(plan)


def _run_in_process(plan: Plan, case: Case, start: int) -> Result:
    return _bench(plan).run(case, start)
