"""Settings as command lines write them: `word,key=value,...`, the way vltok writes methods."""

import ast
import re
from typing import Any

import torch


def parse_fields(text: str) -> dict[str, Any]:
    """Read "img_size=32,scale=(0.6,1.0),global_pool=avg"; a value that is no Python literal is a word.

    Raises:
        ValueError: If a part is not key=value, or a key comes twice.
    """
    fields: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text) if text.strip() else []:  # not at commas inside brackets
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"settings are written key=value with commas between them, got {part!r} in {text!r}")
        if key in fields:
            raise ValueError(f"{key} is set twice in {text!r}")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return fields


def parse_named(text: str) -> tuple[str, dict[str, Any]]:
    """Read "crop-flip,pad=4": a word, then settings as `parse_fields` reads them."""
    word, _, rest = text.partition(",")
    return word.strip(), parse_fields(rest)


def parse_seeds(text: str) -> list[int]:
    """Read "0,1,2".

    Raises:
        ValueError: If a part is not a whole number from 0, or comes twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"seeds are different whole numbers from 0 with commas between them, got {text!r}")
    return [int(part) for part in parts]


def pick_device(name: str | None) -> torch.device:
    """The device of a name; by default the accelerator, or the CPU where there is none.

    Raises:
        ValueError: If it can't be used.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} can't be used: {error}") from error
