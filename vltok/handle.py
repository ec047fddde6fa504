"""Handle: takes methods off a model, says what they did, and can be found again on the model that it is about."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TextIO

import torch
from torch import nn

from vltok.calls import Calls
from vltok.edits import Edits
from vltok.method import Method
from vltok.report import Report
from vltok.run import Run
from vltok.version import __version__

_STDOUT = object()
_MARK = "_vltok_attachments"  # on a host: the list of what is on it


class Attachment:
    """What `apply` left on a host, where handles find it, also on a copy of the host; it knows no wrapper around it.

    Attributes:
        methods: The methods, in the order they were applied, with what they left to the model filled in.
        family: Name of the model's family.
        host: The part of the model that the family is about.
        edits: The ledger of changes.
        run: Where the methods leave results.
        calls: The calls of the host.
        processor: The model's processor, if one was passed.
        marks: The ids that stand for visual tokens, by kind, where they were passed.
        since: When it was made, in ns.
    """

    _handle: weakref.ref[Handle] | None = None

    def __init__(
        self,
        methods: tuple[Method, ...],
        family: str,
        host: nn.Module,
        edits: Edits,
        run: Run,
        calls: Calls,
        processor: Any = None,
        marks: Mapping[str, int] | None = None,
    ) -> None:
        self.methods = methods
        self.family = family
        self.host = host
        self.edits = edits
        self.run = run
        self.calls = calls
        self.processor = processor
        self.marks = marks or {}
        self.since = time.time_ns()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handle"}

    def leave_on_host(self) -> None:
        """Let it be found on the host until its changes are undone."""
        self.edits.list_on(self.host, _MARK, self)

    def handle(self, model: nn.Module) -> Handle:
        """The handle that somebody holds, or one of this model."""
        handle = None if self._handle is None else self._handle()
        return Handle(model, self) if handle is None else handle

    def know(self, handle: Handle) -> None:
        """Give this handle to whoever asks for one."""
        self._handle = weakref.ref(handle)


class Handle:
    """Methods that sit on a model. Also a context manager: the methods leave with the block.

    It may be copied or pickled, alone, with its model or by way of the model; the copy acts on the copied model alone.

    Attributes:
        model: The model as it was passed to `apply`, or to `handles` once that handle was lost.
    """

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        self.model = model  # before the attachment, so that a copy of the handle begins with the model
        self._attachment = attachment
        attachment.know(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attachment.know(self)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in the order they were applied, with what they left to the model filled in."""
        return self._attachment.methods

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self._attachment.family

    @property
    def host(self) -> nn.Module:
        """The part of the model that the family is about; names of added weights count from it, whatever wraps it."""
        return self._attachment.host

    @property
    def processor(self) -> Any:
        """The model's processor, if one was passed."""
        return self._attachment.processor

    @property
    def added_modules(self) -> tuple[nn.Module, ...]:
        """Modules the methods brought into the model."""
        return self._attachment.edits.added_modules

    @property
    def is_attached(self) -> bool:
        """Whether the methods are still on the model."""
        return len(self._attachment.edits) > 0

    def remove(self) -> None:
        """Take the methods off: the model is bit for bit what it was. Does nothing the second time.

        Calls that other threads are making, such as generate(), are waited for, up to a minute; those that begin
        meanwhile wait for the end of this.

        Raises:
            EditConflictError: If a handle applied later changed the same part, remove that one first; if a call is
                still under way after a minute; or if this is called from inside a call, such as by a hook or streamer.
        """
        if self.is_attached:
            with self._attachment.calls.paused():
                self._attachment.edits.undo()

    def using(self, **knobs: Any) -> AbstractContextManager[None]:
        """Use other settings in a block, for the calls of this thread; nothing is attached anew.

        with handle.using(keep_ratio=0.5):
            model.generate(**inputs)

        Blocks nest. A setting goes to every method that has it; keep_ratio takes the place of num_keep, and the other
        way round.

        Args:
            knobs: Settings of the methods, checked at once.

        Raises:
            ValueError: If a method needs to be attached anew for a setting, or none has it; if its value is out of
                range; or if the handle was removed.
            TypeError: If a value is of the wrong type.
        """
        if not self.is_attached:
            raise ValueError("this handle was removed from its model, so its settings are of no effect; apply it anew")
        allowed = {name: None for method in self.methods for name in method.per_call()}  # in order
        if unknown := sorted(knobs.keys() - allowed.keys()):
            names = ", ".join(type(each).__name__ for each in self.methods)
            raise ValueError(
                f"using() can't change {', '.join(unknown)} of {names} for a block, it can change "
                f"{', '.join(allowed) or 'nothing'}; for other settings, remove the handle and apply the method anew"
            )
        run = self._attachment.run
        return run.using([(method, _with(run.current(method), knobs)) for method in self.methods])

    def report(self, file: TextIO | object | None = _STDOUT) -> Report:
        """Print and return what the methods did in the last call of this thread; of any thread if this made none.

        Args:
            file: Where to print; standard output by default, None for nowhere.
        """
        results = self._attachment.run.last_results()
        parts = ("attention", "pooling", "merging", "diversification", "condensed")
        report = results.get("pruning", Report())
        report = replace(report, **{name: results.get(name) for name in parts})
        if report.images is False:
            report = replace(report, condensed=None)  # is of a call before
        if file is not None:
            print(report, file=sys.stdout if file is _STDOUT else file)
        return report

    def settings(self) -> dict[str, Any]:
        """What is on the model, as plain data: the vltok version, the family, and every method with its settings.

        With family="generic" also the ids of placeholders that `apply` was given.
        """
        return settings(self.family, self.methods, self._attachment.marks)

    def loss(self) -> torch.Tensor:
        """Sum of the loss terms of the last call of this thread, a scalar to add to the model's own loss.

        0 where there are none; if this thread made no call, those of the last call of any thread.
        """
        return sum(self._attachment.run.last_losses().values(), torch.zeros(()))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "removed"
        return f"Handle({', '.join(map(repr, self.methods))}, {type(self.model).__name__}, {state})"


def handles(model: nn.Module) -> list[Handle]:
    """Find what is on a model, in the order it was applied: also inside a wrapper, on a copy, or after unpickling.

    Args:
        model: The model, or anything around it.

    Raises:
        TypeError: If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"handles() takes a model (torch.nn.Module), got {type(model).__name__}")
    found = [each for part in model.modules() for each in vars(part).get(_MARK, ())]
    return [each.handle(model) for each in sorted(found, key=lambda each: each.since)]


def remove(model: nn.Module) -> None:
    """Take everything off a model, what was applied last first. Does nothing where nothing is on.

    Args:
        model: The model, or anything around it.

    Raises:
        TypeError: If `model` is not a module.
        EditConflictError: As for `Handle.remove`.
    """
    for handle in reversed(handles(model)):
        handle.remove()


def settings(family: str, methods: Iterable[Method], marks: Mapping[str, int]) -> dict[str, Any]:
    """Describe methods on a model of a family as plain data, the head of every file that vltok writes.

    Args:
        family: Its name.
        methods: The methods.
        marks: The ids that stand for visual tokens, by kind, where somebody said so.
    """
    told = {"vltok_version": __version__, "family": family, "methods": [method.to_dict() for method in methods]}
    return told | {f"{kind}_token_id": mark for kind, mark in marks.items()}


def _with(method: Method, knobs: dict[str, Any]) -> Method:
    """The method with those of the knobs that it has."""
    own = {name: value for name, value in knobs.items() if name in method.per_call()}
    for name, other in (("keep_ratio", "num_keep"), ("num_keep", "keep_ratio")):
        if own.get(name) is not None and other in method.per_call():
            own.setdefault(other, None)
    return method.with_settings(**own) if own else method
