"""Measuring time and memory of things run side by side in one process, for the benchmarks."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    features = torch.cpu.get_capabilities()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else features.get("cpu_name", "CPU"),
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
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if accumulating or device == "cuda" else None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        module.zero_grad()
        return torch.cuda.max_memory_allocated() - before
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


def timed(functions: dict[str, Callable[[], Any]], clean: Callable[[], Any], device: str, rounds: int, seconds: float):
    """Run functions in turns, after one round to warm up: the times of each, in seconds, round by round.

    Stops early when the case has used up its seconds, but not before the third round.
    """
    own_time = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for number in range(rounds + 1):
        for name in order:
            wait()
            start = clock()
            functions[name]()
            wait()
            taken = clock() - start
            clean()
            if number > 0:
                times[name].append(taken)
        order = order[1:] + order[:1]  # nobody always runs first
        if number >= 3 and sum(map(sum, times.values())) > seconds:
            break
    return times


def numbers(text: str) -> list[int]:
    """The whole numbers of a list such as "1,8"."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise typer.BadParameter(f"must be whole numbers from 1 on, separated by commas, got {text!r}")
    return values
