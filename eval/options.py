"""The options that all measuring commands share, and how their values are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("device", "threads", "dtype", "dtypes", "rounds", "seconds", "quick", "json", "out")


def common(*names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parent for `argparse.ArgumentParser(parents=[...])` with some of the shared options.

    Args:
        *names: Which of `NAMES`.
        **defaults: Their defaults, where they are not those below. That of "quick" is a text: what the mode leaves out.

    Raises:
        ValueError: If a name is none of `NAMES`.
    """
    if unknown := [name for name in {*names, *defaults} if name not in NAMES]:
        raise ValueError(f"the shared options are {', '.join(NAMES)}, got {', '.join(unknown)}")
    quick = defaults.get("quick", "fewer cases and rounds")
    known: dict[str, dict[str, Any]] = {
        "device": {"type": device, "default": "cpu", "help": "cpu, cuda or auto, the accelerator if there is one"},
        "threads": {"type": count, "default": 1, "help": "CPU threads; with one the clock is its own CPU time"},
        "dtype": {"type": dtypes(many=False), "default": "float32", "help": f"one of {', '.join(DTYPES)}"},
        "dtypes": {"type": dtypes(many=True), "default": "float32", "help": f"any of {', '.join(DTYPES)}"},
        "rounds": {"type": count, "default": 7, "help": "rounds to measure, after one to warm up"},
        "seconds": {"type": float, "default": 60.0, "help": "stop a case after so long, not before three rounds"},
        "quick": {"action": "store_true", "help": quick},
        "json": {"type": Path, "metavar": "FILE", "help": "write everything to this file"},
        "out": {"type": Path, "metavar": "FOLDER", "help": "write everything to this folder"},
    }
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("measuring")
    for name in names:
        if name != "quick" and name in defaults:
            known[name]["default"] = defaults[name]
        shown = " (%(default)s)" if known[name].get("default") is not None else ""
        group.add_argument(f"--{name}", **{**known[name], "help": known[name]["help"] + shown})
    return parent


def parser(about: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the docstring of the command, laid out as it is there."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=about, parents=list(parents), formatter_class=layout)


def parse(
    command: argparse.ArgumentParser, argv: Sequence[str] | None = None, quick: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Read the command line, and set torch's threads where it says so.

    Args:
        command: The parser.
        argv: The words, those of the process by default.
        quick: Defaults that hold with `--quick`; what stands on the command line comes before them.
    """
    found = command.parse_args(argv)
    if quick and found.quick:
        command.set_defaults(**quick)
        found = command.parse_args(argv)
    if getattr(found, "threads", None) is not None:
        torch.set_num_threads(found.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports missing GPUs as errors otherwise
    return found


def device(text: str) -> str:
    """A device that can be used, by its name; "auto" is the accelerator if there is one."""
    if text == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else str(found)
    try:
        return str(torch.empty(1, device=text).device) if ":" in text else torch.empty(1, device=text).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text} can't be used: {str(error).splitlines()[0]}") from error


def count(text: str) -> int:
    """A whole number from 1 on."""
    return numbers(text, many=False)[0]


def numbers(text: str, many: bool = True) -> list[int]:
    """The whole numbers from 1 on of a list such as "1,8"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (len(parts) > 1 and not many):
        wanted = "whole numbers from 1 on, separated by commas" if many else "a whole number from 1 on"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return [int(part) for part in parts]


def shares(text: str) -> list[float]:
    """The shares in (0, 1] of a list such as "0.25,0.1", as they stand there."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"must be numbers in (0, 1], separated by commas, got {text!r}")
    return found


def dtypes(many: bool) -> Callable[[str], Any]:
    """Read the name of a dtype, or a list of names; torch knows them by `DTYPES`."""

    def read(text: str) -> Any:
        names = text.split(",")
        if any(name not in DTYPES for name in names) or (len(names) > 1 and not many):
            wanted = "any of" if many else "one of"
            raise argparse.ArgumentTypeError(f"must be {wanted} {', '.join(DTYPES)}, got {text!r}")
        return names if many else names[0]

    return read
