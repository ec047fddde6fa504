"""Many calls of one pruned model: threads must not see each other, and handles must leave nothing behind.

    python -m eval.stress
    python -m eval.stress --calls 1000 --threads 8 --cycles 1000

First, the canvas model answers alternating questions (one picture each, and text alone) from several threads under each
method: words, logits, kept tokens and decisions of every call must equal those of the same call made alone. Then the
method is applied, called and removed over and over: objects, hooks, attributes, weights and bytes must not add up.
Prints a line per check and exits 1 if one fails. Needs the `eval` packages; a minute or two on two CPU cores.
"""

from __future__ import annotations

import collections
import gc
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import vltok
from eval import options
from eval.canvas.data import Canvases
from eval.canvas.model import MODEL_DIR, load
from eval.canvas.runner import draw_questions, encode

METHODS: dict[str, vltok.Method] = {
    "ToDRE": vltok.ToDRE(keep_ratio=0.1, tau=0.3),
    "DivPrune": vltok.DivPrune(keep_ratio=0.1),
    "FasterVLM": vltok.FasterVLM(keep_ratio=0.25, positions="reindex"),
    "TokenPacker": vltok.TokenPacker(scale_factor=2, init="pool"),
}
QUESTIONS = 12
WORDS = 3


def prompts(processor: Any) -> list[Any]:
    """Prompts of one question about one canvas each, every fourth one of text alone."""
    canvases = Canvases("test")
    batches = encode(processor, canvases, draw_questions(canvases, QUESTIONS), 1, wrong_image=False)
    text = processor(text=[canvases.questions(0)[0].text], return_tensors="pt")
    return [text if number % 4 == 3 else batch for number, batch in enumerate(batches)]


def answer(model: torch.nn.Module, handle: vltok.Handle, inputs: Any) -> tuple[Any, ...]:
    """Everything a call gives: words, logits, and what the report tells of it."""
    words = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False).tolist()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    report = handle.report(file=None)
    picks = [image.tolist() for row in report.keep_indices for image in row]
    decided = [(record.layer, record.dropped) for row in report.relevance for record in row]
    return words, logits, picks, decided


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two calls gave the same, bit for bit."""
    return torch.equal(one[1], other[1]) and (one[0], *one[2:]) == (other[0], *other[2:])


def check_threads(model: torch.nn.Module, processor: Any, method: vltok.Method, calls: int, threads: int) -> str:
    """Compare calls of several threads with single ones; what went wrong, or nothing."""
    with vltok.apply(model, method, processor=processor) as handle:
        inputs = prompts(processor)
        alone = [answer(model, handle, each) for each in inputs]
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(answer, model, handle, inputs[call % len(inputs)]) for call in range(calls)]
        errors = collections.Counter(type(job.exception()).__name__ for job in jobs if job.exception())
        done = [(call, job) for call, job in enumerate(jobs) if not job.exception()]
        wrong = sum(not equal(job.result(), alone[call % len(inputs)]) for call, job in done)
    return f"{wrong} of {calls} calls differ, errors: {dict(errors)}" if wrong or errors else ""


def inventory(model: torch.nn.Module) -> dict[str, int]:
    """How much there is of what could add up."""
    gc.collect()
    modules = list(model.modules())
    return {
        "objects": len(gc.get_objects()),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "attributes": sum(len(vars(module)) for module in modules),
        "hooks": sum(
            len(vars(m)[name]) for m in modules for name in vars(m) if name.endswith("_hooks") and vars(m)[name]
        ),
        "modules": len(modules),
        "weights": sum(weight.numel() for weight in model.parameters()),
    }


def check_leaks(model: torch.nn.Module, processor: Any, method: vltok.Method, cycles: int) -> str:
    """Apply, call and remove over and over; what added up, or nothing."""

    def cycle(inputs: Any) -> None:
        with vltok.apply(model, method, processor=processor) as handle:
            answer(model, handle, inputs)

    with vltok.apply(model, method, processor=processor):
        inputs = prompts(processor)[:4]
    for each in inputs * 3:  # caches of Python, torch and transformers fill up first
        cycle(each)
    before = inventory(model)
    for number in range(cycles):
        cycle(inputs[number % len(inputs)])
    after = inventory(model)
    # One object in ten cycles is noise of the interpreter; a leak would be one or more a cycle.
    grown = {name: after[name] - before[name] for name in before if after[name] - before[name] > 0}
    grown = {name: count for name, count in grown.items() if name != "objects" or count > cycles / 10}
    return f"grew in {cycles} cycles: {grown}" if grown else ""


def main(argv: Sequence[str] | None = None) -> int:
    command = options.parser(__doc__, options.common("quick", quick="a tenth of the calls and cycles"))
    command.add_argument("--calls", type=options.count, default=300, help="alternating calls of each method")
    command.add_argument("--threads", type=options.count, default=4, help="that call (%(default)s)")
    command.add_argument("--cycles", type=options.count, default=300, help="of apply, call, remove, for each method")
    command.add_argument("--method", choices=METHODS, action="append", help="only this one; may be given again")
    asked = options.parse(command, argv, {"calls": 30, "cycles": 30})
    torch.set_num_threads(1)  # the threads are the point
    sys.setswitchinterval(1e-5)
    failed = False
    for name in asked.method or METHODS:
        model, processor = load(MODEL_DIR, torch.float32, "cpu")
        checks = {
            f"{asked.calls} calls from {asked.threads} threads": (check_threads, asked.calls, asked.threads),
            f"{asked.cycles} cycles": (check_leaks, asked.cycles),
        }
        for what, (check, *counts) in checks.items():
            problem = check(model, processor, METHODS[name], *counts)
            print(f"{name}, {what}: {problem or 'ok'}", flush=True)
            failed |= bool(problem)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
