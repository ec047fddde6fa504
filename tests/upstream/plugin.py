"""A pytest plugin: every model that is built gets a selector which keeps all tokens, and outcomes go to a file."""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

OUTCOMES: dict[str, tuple[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("VLTOK_UPSTREAM_METHOD"):
        _apply_to_all(os.environ["VLTOK_UPSTREAM_METHOD"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        lines = str(report.longrepr).strip().splitlines() if report.failed else []
        errors = [line[2:].strip() for line in lines if line.startswith("E ")]
        OUTCOMES[report.nodeid] = report.outcome, (errors or lines or [""])[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["VLTOK_UPSTREAM_OUTCOMES"]).write_text(json.dumps(OUTCOMES, indent=1))


def _apply_to_all(text: str) -> None:
    """Wrap the constructors of the tiny families' classes: the outermost model being built gets the method."""
    import tiny

    import vltok
    from vltok.errors import UnsupportedModelError
    from vltok.method import Method

    building = threading.local()

    def wrap(cls: type) -> None:
        build = cls.__init__

        @functools.wraps(build)
        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            outermost = not getattr(building, "busy", False)
            building.busy = True
            try:
                build(self, *args, **kwargs)
            finally:
                building.busy = not outermost
            if outermost:
                try:
                    vltok.apply(self, Method.from_text(text))
                except UnsupportedModelError as error:
                    OUTCOMES[f"{type(self).__name__} as a whole"] = "refused", str(error)

        cls.__init__ = construct

    models = [family.build("sdpa") for family in tiny.ALL]
    for cls in {type(part) for model in models for part in (model, model.model)}:
        wrap(cls)
