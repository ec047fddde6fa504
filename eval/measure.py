"""Measuring time and memory of things run side by side in one process, for the benchmarks."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from eval import options


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    features = torch.cpu.get_capabilities()
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else features.get("cpu_name", "CPU"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bool(features.get("amx_bf16")),
        "avx512_bf16": bool(features.get("avx512_bf16")),
    }


def cpu_allocations(run: Callable[[], Any]) -> list[tuple[int, int]]:
    """Every (address, bytes) that PyTorch allocates on the CPU while it runs, in order; freed bytes are negative."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        result = run()
    del result  # lives until here: what a call returns is part of what it takes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["ts"])
    return [(int(event["args"]["Addr"]), int(event["args"]["Bytes"])) for event in memory]


def peak_bytes(run: Callable[[], Any], module: nn.Module, device: str, accumulating: bool) -> int:
    """Largest number of bytes above weights, inputs and their gradients that are live at once.

    `accumulating`: gradients of the module are there beforehand and are added to. On CUDA that is measured always.
    """
    parameters, on_gpu = list(module.parameters()), device.startswith("cuda")
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if accumulating or on_gpu else None
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        module.zero_grad()
        return torch.cuda.max_memory_allocated(device) - before
    born = cpu_allocations(run)
    # a gradient that the run made is the last thing that was allocated where it lies
    lies = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None and not accumulating}
    made = {address: number for number, (address, size) in enumerate(born) if size > 0 and address in lies}
    module.zero_grad()
    live = peak = 0
    for number, (address, size) in enumerate(born):
        live += 0 if made.get(address) == number else size
        peak = max(peak, live)
    return peak


def clock_of(device: str) -> Callable[[], float]:
    """A clock in seconds that waits for the device; on one CPU thread that thread's own time, others don't count."""
    if device == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def timed(
    functions: Mapping[str, Callable[[], Any]],
    clean: Callable[[], Any] = lambda: None,
    device: str = "cpu",
    rounds: int = 7,
    seconds: float = math.inf,
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Run functions in turns, after one round to warm up: the times of each, in seconds, round by round.

    Args:
        functions: What is timed, by name.
        clean: Called after each, outside the time.
        device: Where they run.
        rounds: How many rounds.
        seconds: Stops when the case has used up so many, but not before the third round.
        around: Gives, for a name, the context that its function runs in; entering and leaving it are not timed.
        clock: Tells the seconds, by default `clock_of(device)`.
    """
    now = clock or clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for number in range(rounds + 1):
        for name in order:
            with around(name):
                start = now()
                functions[name]()
                taken = now() - start
            clean()
            if number > 0:
                times[name].append(taken)
        order = order[1:] + order[:1]  # nobody always runs first
        if number >= 3 and sum(map(sum, times.values())) > seconds:
            break
    return times


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians, to the microsecond; for orientation, as they hold for this machine at this hour only."""
    return {name: round(statistics.median(taken) * 1e3, 3) for name, taken in times.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of the ratios within a round."""
    return quartiles(above, below)[1]


def quartiles(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Of the ratios within a round: the lower quartile, the median and the upper quartile."""
    ratios = [x / y for x, y in zip(above, below, strict=True)]
    return tuple(statistics.quantiles(ratios, n=4, method="inclusive")) if len(ratios) > 1 else (ratios[0],) * 3


def numbers(text: str) -> list[int]:
    """`eval.options.numbers` for commands that are made with typer."""
    try:
        return options.numbers(text)
    except argparse.ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error
