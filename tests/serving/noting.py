"""Notes what selectors pick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vltok.methods import Selector


@contextmanager
def noting(picked: dict[str, list[int]]) -> Iterator[None]:
    """Note what selectors pick while the block runs, by the key of the image; what is asked again is noted once."""
    pick = Selector.pick

    def noted(self: Selector, visual: Any, num_keep: int) -> Any:
        selection = pick(self, visual, num_keep)
        for key, row in zip(visual.image_keys.tolist(), selection.indices.tolist(), strict=True):
            picked.setdefault(str(key), row)
        return selection

    Selector.pick = noted
    try:
        yield
    finally:
        Selector.pick = pick
