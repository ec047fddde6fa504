"""apply() puts methods on a model, the Handle it returns takes them off again and says what they did."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TextIO

import torch
from torch import nn

from vltok import families
from vltok.edits import Edits
from vltok.method import Method, Run
from vltok.report import Report
from vltok.version import __version__

_STDOUT = object()


class Handle:
    """Methods that sit on a model. Also a context manager: the methods leave with the block.

    Attributes:
        model: The model as it was passed to `apply`.
        methods: The methods, in the order they were applied, with what they left to the model filled in.
        family: Name of the model's family.
        processor: The model's processor, if one was passed.
        host: The part of the model that the family is about; names of added weights count from it, whatever wraps it.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        family: str,
        edits: Edits,
        run: Run,
        host: nn.Module,
        processor: Any = None,
    ) -> None:
        self.model = model
        self.host = host
        self.processor = processor
        self.methods = methods
        self.family = family
        self._edits = edits
        self._run = run

    @property
    def added_modules(self) -> tuple[nn.Module, ...]:
        """Modules the methods brought into the model."""
        return self._edits.added_modules

    @property
    def is_attached(self) -> bool:
        """Whether the methods are still on the model."""
        return len(self._edits) > 0

    def remove(self) -> None:
        """Take the methods off: the model is bit for bit what it was. Does nothing the second time.

        Raises:
            EditConflictError: If a handle applied later changed the same part; remove that one first.
        """
        self._edits.undo()

    def report(self, file: TextIO | object | None = _STDOUT) -> Report:
        """Print and return what the methods did at the last prompt with images.

        Args:
            file: Where to print; standard output by default, None for nowhere.
        """
        results = self._run.results
        parts = ("attention", "pooling", "diversification", "condensed")
        report = replace(results.get("pruning", Report()), **{name: results.get(name) for name in parts})
        if file is not None:
            print(report, file=sys.stdout if file is _STDOUT else file)
        return report

    def settings(self) -> dict[str, Any]:
        """What is on the model, as plain data: the vltok version, the family, and every method with its settings."""
        return settings(self.family, self.methods)

    def loss(self) -> torch.Tensor:
        """Sum of the loss terms of the last call, a scalar to add to the model's own loss; 0 where there are none."""
        return sum(self._run.losses.values(), torch.zeros(()))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "removed"
        return f"Handle({', '.join(map(repr, self.methods))}, {type(self.model).__name__}, {state})"


def apply(model: nn.Module, method: Method | Iterable[Method], *, processor: Any = None) -> Handle:
    """Put one or several methods on a model, in place.

    Args:
        model: A Hugging Face vision-language model of a supported family: bare, with its head, or wrapped.
        method: The method, or several, applied in order.
        processor: The model's processor, for methods that change how many placeholders an image gets.

    Returns:
        The handle that reports and removes. If anything fails, the model is left as it was.

    Raises:
        TypeError: If `model` is not a module or `method` not a Method.
        UnsupportedModelError: If the model, or a part the method needs, is not one vltok knows.
        ValueError: If the method doesn't fit the model, or another one is in the way.
    """
    methods = tuple(method) if isinstance(method, Iterable) else (method,)
    for item in methods:
        if not isinstance(item, Method):
            hint = "; make an instance of it" if isinstance(item, type) and issubclass(item, Method) else ""
            raise TypeError(f"apply() takes methods such as vltok.ToDRE(keep_ratio=0.1), got {item!r}{hint}")
    if not methods:
        raise ValueError("apply() takes at least one method, got none")
    view = families.view(model, processor)
    edits, run = Edits(), Run()
    try:
        settled: tuple[Method, ...] = ()
        for item in methods:
            settled += (item.settled(view),)
            settled[-1].attach(view, edits, run)
        if edits.added_modules:
            view.mark_checkpoint(edits, settings(view.family.name, settled))
    except BaseException:
        edits.undo()
        raise
    return Handle(model, settled, view.family.name, edits, run, view.host, processor)


def settings(family: str, methods: Iterable[Method]) -> dict[str, Any]:
    """Describe methods on a model of a family as plain data, the head of every file that vltok writes."""
    return {"vltok_version": __version__, "family": family, "methods": [method.to_dict() for method in methods]}
