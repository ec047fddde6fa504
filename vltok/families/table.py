"""A line of the tables of families: how to find a family without importing anything of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A family.

    Attributes:
        defined_in: Full name of the module, or package, that defines the model's class.
        module: The module that describes the family: a file of the table's package, or a full name.
        class_name: The class in it.
        facts: Arguments for the class.
    """

    defined_in: str
    module: str
    class_name: str
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
