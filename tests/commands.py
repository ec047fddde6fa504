"""Commands of eval as a person gives them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def call(command: ModuleType, *arguments: Any) -> None:
    """Run a command with its arguments."""
    command.main([*map(str, arguments)])


def refused(command: ModuleType, *arguments: Any) -> str:
    """What a command says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        call(command, *arguments)
    return str(stopped.value)
