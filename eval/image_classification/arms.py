"""Arms: the things that are compared. An arm is a name, the methods on its model, and perhaps a trained start."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import vltok

_ARM = re.compile(r"(?P<name>\w[\w.+-]*)(@(?P<start>[^=]+))?=(?P<methods>.*)", re.DOTALL)
_HOW = (
    'an arm is written NAME=METHODS or NAME@START=METHODS, such as "soft=soft,ratio=2", "both=tap+adl,weight=1", '
    '"softmax=" without methods, or "tuned@softmax=soft,ratio=2"'
)


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: In the table and in file names.
        methods: What is put on the model, in order; none for the model as it is.
        start: None to start from the model's own weights, else the name of the arm whose trained weights it starts
            from, or a file of weights, in which "{seed}" stands for the seed.
    """

    name: str
    methods: tuple[vltok.Method, ...] = ()
    start: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The arm as plain data."""
        return {"name": self.name, "methods": [method.to_dict() for method in self.methods], "start": self.start}


def parse_methods(text: str) -> tuple[vltok.Method, ...]:
    """Read methods joined by "+", each as `vltok.Method.from_text` reads it; nothing for no method."""
    parts = re.split(r"\+(?=\s*[A-Za-z_{])", text) if text.strip() else []  # not the plus of a number such as 1e+3
    return tuple(vltok.Method.from_text(part.strip()) for part in parts)


def parse_arm(text: str) -> Arm:
    """Read "NAME=METHODS" or "NAME@START=METHODS".

    Raises:
        ValueError: If it is written otherwise.
        vltok.errors.CheckpointError: If a method or a setting is unknown.
    """
    found = _ARM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{_HOW}; got {text!r}")
    return Arm(found["name"], parse_methods(found["methods"]), found["start"])


def plan_arms(arms: Sequence[str], methods: Sequence[str], start_from: str | None) -> list[Arm]:
    """Make the arms of a run from its options, in the order of the table.

    Args:
        arms: As `parse_arm` reads them.
        methods: Methods of the only arm, where no arms are given.
        start_from: Where arms with methods start, unless they say so themselves.

    Raises:
        ValueError: If the options contradict each other, or a start is not there.
    """
    if arms and methods:
        raise ValueError(f"give methods as part of the arms, or --method without --arm; {_HOW}")
    planned = [parse_arm(text) for text in arms]
    if not planned:
        parsed = parse_methods("+".join(methods))
        planned = [Arm("+".join(method.name for method in parsed) or "plain", parsed)]
    if start_from is not None:
        planned = [replace(arm, start=arm.start or start_from) if arm.methods else arm for arm in planned]
    names = [arm.name for arm in planned]
    if len({name.lower() for name in names}) < len(names):  # files of arms that differ in case would meet
        raise ValueError(f"every arm needs a name of its own, got {', '.join(names)}")
    for arm in planned:
        start_arm(arm, planned)
    training_order(planned)
    return planned


def start_arm(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that another one starts from, None where it starts from nothing or from a file.

    Raises:
        ValueError: If the start is neither an arm without methods nor a file's name.
    """
    found = next((other for other in arms if other.name == arm.start), None)
    if found is not None and found.methods:
        raise ValueError(f"arm {arm.name!r} can only start from an arm without methods; {found.name!r} has some")
    if found is None and arm.start is not None and Path(arm.start).suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(
            f'arm {arm.name!r} starts from {arm.start!r}, which is none of the arms; add --arm "{arm.start}=" to train '
            "it first, or name a .safetensors or .pth file"
        )
    return found


def training_order(arms: Sequence[Arm]) -> list[Arm]:
    """The arms in an order in which every start is trained before it is needed.

    Raises:
        ValueError: If arms start from each other.
    """
    ordered: list[Arm] = []
    waiting = list(arms)
    while waiting:
        ready = [arm for arm in waiting if start_arm(arm, arms) in (None, *ordered)]
        if not ready:
            raise ValueError(f"the arms {', '.join(arm.name for arm in waiting)} start from each other")
        ordered += ready
        waiting = [arm for arm in waiting if arm not in ready]
    return ordered
