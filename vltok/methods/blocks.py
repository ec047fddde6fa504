"""Which blocks of a vision tower a method is for."""

from __future__ import annotations

Blocks = tuple[int | None, int | None]


def check_blocks(blocks: object) -> Blocks | None:
    """Read (start, stop), also from a list; None stands for all blocks.

    Raises:
        TypeError: If it is neither.
    """
    if blocks is None:
        return None
    ends = tuple(blocks) if isinstance(blocks, tuple | list) else ()
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | None) for end in ends):
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
