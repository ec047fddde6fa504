"""Checks of what users pass as settings (numbers, choices, budgets, blocks of a vision tower), and of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch

from vltok.errors import CheckpointError

Blocks = tuple[int | None, int | None]


def is_integer(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type that a field of settings is annotated with; unusual annotations take anything."""
    kinds = {bool: lambda x: isinstance(x, bool), int: is_integer, float: is_number, str: lambda x: isinstance(x, str)}
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if origin is tuple and isinstance(value, tuple):
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(each) == len(value) and all(map(fits, value, each))
    if origin is tuple or hint is type(None):
        return hint is type(None) and value is None
    return kinds.get(hint, lambda x: True)(value)


def check_integer(name: str, value: object, least: int | None = None) -> None:
    """Check a whole number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is below `least`.
    """
    if not is_integer(value):
        bound = "" if least is None else f" of at least {least}"
        raise TypeError(f"{name} must be an integer{bound}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_share(name: str, value: object) -> None:
    """Raise ValueError if `value` is not a number in 0..1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in 0..1, got {value!r}")


def check_regions(name: str, value: object) -> tuple[int, int]:
    """Read numbers of regions, (down, across), also from a list.

    Raises:
        TypeError: If these are no two integers.
        ValueError: If one is below 1.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers of regions, (down, across), such as (2, 2), got {value!r}")
    for number in value:
        check_integer(name, number, least=1)
    return value[0], value[1]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError if `value` is not one of a Literal's values, or of a tuple's."""
    allowed = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_budget(keep_ratio: object, num_keep: object) -> None:
    """Check the type and range of whichever of the two is given.

    Raises:
        TypeError: If one is not a number of the right kind.
        ValueError: If one is out of range.
    """
    if keep_ratio is not None:
        if not is_number(keep_ratio):
            raise TypeError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}")
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is the share of visual tokens to keep, in (0, 1], got {keep_ratio}")
    if num_keep is not None:
        if not is_integer(num_keep):
            raise TypeError(f"num_keep must be an integer of at least 1, got {num_keep!r}")
        if num_keep < 1:
            raise ValueError(f"num_keep is the number of visual tokens to keep, at least 1, got {num_keep}")


def check_one_budget(method: str, keep_ratio: object, num_keep: object) -> None:
    """Check that exactly one of the two is given to a method of this name, as `check_budget` wants it.

    Raises:
        TypeError: If it is not a number of the right kind.
        ValueError: If it is out of range, or both are given, or neither.
    """
    if (keep_ratio is None) == (num_keep is None):
        given = "neither" if keep_ratio is None else f"keep_ratio={keep_ratio} and num_keep={num_keep}"
        raise ValueError(f"{method} takes exactly one of keep_ratio and num_keep, got {given}")
    check_budget(keep_ratio, num_keep)


def check_blocks(blocks: object) -> Blocks | None:
    """Read (start, stop), also from a list; None stands for all blocks.

    Raises:
        TypeError: If it is neither.
    """
    if blocks is None:
        return None
    ends = tuple(blocks) if isinstance(blocks, tuple | list) else ()
    if len(ends) != 2 or not all(end is None or is_integer(end) for end in ends):
        raise TypeError(f"blocks must be (start, stop), integers or None; got {blocks}")
    return ends


def chosen_blocks(blocks: Blocks | None, depth: int) -> tuple[int, int]:
    """The chosen of so many blocks, as (start, stop) with both counted from 0.

    Raises:
        ValueError: If there are none.
    """
    chosen = range(depth)[slice(*(blocks or (None, None)))]
    if not chosen:
        raise ValueError(f"blocks={blocks} is none of the {depth} blocks of this vision tower")
    return chosen.start, chosen.stop


# Weights that come from files

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LISTED = 20  # names of each kind in an error: weights of another program can differ in thousands


def weight_faults(
    found: Mapping[str, Any],
    expected: Mapping[str, torch.Tensor],
    strangers: Sequence[str] = (),
    called: Mapping[str, str] | None = None,
) -> str:
    """Say what keeps weights from taking the place of others, or nothing if they can.

    Weights are of float64, float32, float16 or bfloat16. Integers and narrower floats are quantised: without their
    scales they mean nothing. A tensor of another kind, such as a counter, must be of that very kind.

    Args:
        found: What was found by name: tensors, or anything that has their shape and dtype.
        expected: The tensors that are to take their values.
        strangers: More names that were found, and are not expected.
        called: What to call what was found, where its name there is another.
    """
    called = called or {}
    faults = {"missing": sorted(expected.keys() - found.keys())}
    faults["unexpected"] = sorted([*strangers, *(called.get(name, name) for name in found.keys() - expected.keys())])
    faults["of another shape"], faults["of another kind"] = [], []
    for name, tensor in expected.items():
        if name in found and tuple(found[name].shape) != tuple(tensor.shape):
            faults["of another shape"].append(
                f"{called.get(name, name)} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )
        if name in found and found[name].dtype not in (FLOATS if tensor.is_floating_point() else (tensor.dtype,)):
            faults["of another kind"].append(f"{called.get(name, name)} is {_kind(found[name].dtype)}")
    return "; ".join(
        f"{what} {', '.join(names[:_LISTED])}{f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''}"
        for what, names in faults.items()
        if names
    )


def check_finite(name: str, tensor: torch.Tensor, place: object) -> None:
    """Raise CheckpointError if a weight found at `place` holds NaN or infinite values."""
    if tensor.dtype in FLOATS and not tensor.is_meta and not tensor.isfinite().all():
        raise CheckpointError(f"{name} in {place} holds values that are NaN or infinite as {_kind(tensor.dtype)}")


def _kind(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
