"""Spread an evaluation over processes: with a model this small, one thread in each of two beats two threads in one."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import BatchFeature

from eval.canvas.data import Canvases, Question, kinds_known, load_items
from eval.canvas.memory import early_layers_remembered
from eval.canvas.model import load
from eval.canvas.runner import Case, Result, draw_questions, encode, evaluate

CHUNK = 4  # batches per task; a task answers them under every case


@dataclass(frozen=True)
class Plan:
    """What a process needs to answer the same questions as any other: all values are plain, so it can be sent."""

    model: Path
    dtype: str
    device: str
    items: Path | None
    seed: int
    questions: int  # at least so many with answers of one word
    batch_size: int


class Bench:
    """The model, its processor and the questions of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.processor = load(plan.model, getattr(torch, plan.dtype), plan.device)
        items = None if plan.items is None else load_items(plan.items)
        known = kinds_known(self.processor.tokenizer.get_vocab())
        self.canvases = Canvases("test", plan.seed, items, kinds=known)
        # Batches of short answers end early, and are the same whether or not longer ones are asked.
        drawn = draw_questions(self.canvases, plan.questions)
        self.questions = sorted(drawn, key=lambda question: len(question.answer.split()))

    def chunks(self) -> range:
        """First question of each chunk."""
        return range(0, len(self.questions), CHUNK * self.plan.batch_size)

    def run(self, every: Sequence[Case], start: int) -> list[Result]:
        """Answer one chunk under every case."""
        questions = self.questions[start : start + CHUNK * self.plan.batch_size]
        encoded: dict[tuple[bool, float], list[BatchFeature]] = {}
        results = []
        with early_layers_remembered(self.model):
            for case in every:
                key = (case.wrong_image, case.keep_ratio if case.condenses else 1.0)
                if key not in encoded:
                    encoded[key] = self.encode(case, questions)
                results.append(evaluate(self.model, self.processor, case, encoded[key], questions))
        return results

    def encode(self, case: Case, questions: Sequence[Question]) -> list[BatchFeature]:
        """Processor outputs of questions in batches; a case that condenses has fewer placeholders."""
        with case.put_on(self.model, self.processor):
            return encode(self.processor, self.canvases, questions, self.plan.batch_size, case.wrong_image)


def run_cases(bench: Bench, every: Sequence[Case], jobs: int, advance: Callable[[int], None]) -> list[Result]:
    """Answer all questions under every case.

    Args:
        bench: Used as it is for one job; its plan is sent to the processes of several.
        every: The cases; results come in this order and do not depend on `jobs`.
        jobs: Processes. Each gets its share of the cores as torch threads.
        advance: Called after each chunk with the number of answers.
    """
    results = [Result(case) for case in every]
    for parts in _all_chunks(bench, every, jobs):
        for result, part in zip(results, parts, strict=True):
            result.add(part)
        advance(sum(part.total for part in parts))
    return results


def _all_chunks(bench: Bench, every: Sequence[Case], jobs: int) -> Iterator[list[Result]]:
    if jobs == 1:
        yield from (bench.run(every, start) for start in bench.chunks())
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        # glibc of the new processes keeps freed memory: fresh pages for every activation cost a tenth of the time.
        os.environ.setdefault(name, str(2**32))
    # spawn: a forked process would inherit torch's threads in an unusable state.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_process, (threads,)) as pool:
        tasks = [pool.submit(_run_in_process, bench.plan, every, start) for start in bench.chunks()]
        for task in as_completed(tasks):
            yield task.result()


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # sharp softmaxes underflow, and products of denormals are slow


@lru_cache(maxsize=1)
def _bench(plan: Plan) -> Bench:
    return Bench(plan)


def _run_in_process(plan: Plan, every: Sequence[Case], start: int) -> list[Result]:
    return _bench(plan).run(every, start)
