"""Arms, the things that are compared, and how the command line writes them."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import vltok

WEIGHTS = (".safetensors", ".pth", ".pt")
_ARM = re.compile(r"(?P<name>\w[\w.+-]*)(@(?P<start>[^=]+))?=(?P<methods>.*)", re.DOTALL)


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: In the table and in file names.
        methods: What is put on the model, in order; none for the model as it is.
        start: Whose trained weights it begins with: an arm's name, a file, in which {arm} and {seed} are filled in, or,
            where nothing trains, a folder of `vltok.save`. None for the model's own weights.
    """

    name: str
    methods: tuple[vltok.Method, ...] = ()
    start: str | None = None

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The methods as plain data."""
        return [method.to_dict() for method in self.methods]

    @property
    def words(self) -> str:
        """The methods with those of their settings that are not the defaults; None for none."""
        texts = []
        for method in self.methods:
            changed = [f for f in fields(method) if getattr(method, f.name) != f.default]
            texts.append(f"{method.name}({', '.join(f'{f.name}={getattr(method, f.name)}' for f in changed)})")
        return " + ".join(texts) or "-"


def parse_arm(text: str) -> Arm:
    """Read "NAME=METHODS" or "NAME@START=METHODS".

    Raises:
        ValueError: If it is written otherwise.
        vltok.errors.CheckpointError: If a method or a setting is unknown.
    """
    found = _ARM.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            'an arm is written NAME=METHODS or NAME@START=METHODS, such as "soft=soft,ratio=2", "softmax=" without '
            f'methods, "both=tap+adl,weight=1" or "tuned@softmax=soft,ratio=2"; got {text!r}'
        )
    methods = found["methods"]
    parts = re.split(r"\+(?=\s*[A-Za-z_{])", methods) if methods.strip() else []  # not the plus of 1e+3
    return Arm(found["name"], tuple(vltok.Method.from_text(part.strip()) for part in parts), found["start"])


def parse_arms(texts: Sequence[str], start_from: str | None = None) -> list[Arm]:
    """Read arms, each with a name of its own; `start_from` is the start of those with methods that name none."""
    arms = [parse_arm(text) for text in texts]
    if start_from is not None:
        arms = [replace(arm, start=arm.start or start_from) if arm.methods else arm for arm in arms]
    if len({arm.name.lower() for arm in arms}) < len(arms):  # files of arms that differ in case would meet
        raise ValueError(f"every arm needs a name of its own, got {', '.join(arm.name for arm in arms)}")
    return arms


def start_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that another one starts from; None where it starts from a file or from the model's own weights.

    Raises:
        ValueError: If the start is neither an arm without methods that stands before it, nor a file of weights.
    """
    if arm.start is None or Path(arm.start).suffix in WEIGHTS:
        return None
    for other in arms[: list(arms).index(arm)]:
        if other.name == arm.start and not other.methods:
            return other
    raise ValueError(
        f"arm {arm.name!r} starts from {arm.start!r}, which is no arm without methods before it and no file "
        f'({", ".join(WEIGHTS)}); put --arm "{arm.start}=" before it to train that first'
    )


def find_weights(pattern: str, arm: Arm, seed: int) -> Path:
    """The file of a pattern in which {arm} and {seed} are filled in, and * may stand for what only one file has.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    path = Path(pattern.replace("{arm}", arm.name).replace("{seed}", str(seed)))
    found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] * path.exists()
    if not found:
        raise FileNotFoundError(f"there is no file of weights {path}, of arm {arm.name!r}")
    if len(found) > 1:
        raise ValueError(f"{path} may be {' or '.join(each.name for each in found)}: name one")
    return found[0]


def parse_fields(text: str) -> dict[str, Any]:
    """Read "img_size=32,scale=(0.6,1.0),global_pool=avg"; a value that is no Python literal is a word.

    Raises:
        ValueError: If a part is not key=value, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text) if text.strip() else []:  # not at commas inside brackets
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or key in found:
            raise ValueError(f"settings are key=value, each once, with commas between them; got {part!r} in {text!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def parse_seeds(text: str) -> list[int]:
    """Read "0,1,2".

    Raises:
        ValueError: If a part is not a whole number from 0, or comes twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"seeds are different whole numbers from 0 with commas between them, got {text!r}")
    return [int(part) for part in parts]
