"""An object that stands for another one, some of whose attributes are others."""

from __future__ import annotations

from typing import Any


class Instead:
    """Stands for an object some of whose attributes are others; that one stays as it is.

    Args:
        base: The object.
        replaced: The attributes that are others.
    """

    def __init__(self, base: object, **replaced: object) -> None:
        self._base = base
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        if name == "_base":  # not there yet while this object is copied
            raise AttributeError(name)
        return getattr(self._base, name)
