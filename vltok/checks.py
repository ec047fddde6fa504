"""Checks of what users pass as settings: numbers, choices, budgets, blocks of a vision tower."""

from __future__ import annotations

from typing import Any, get_args

Blocks = tuple[int | None, int | None]


def is_integer(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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
