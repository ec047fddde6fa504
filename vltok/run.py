"""Run: where attached methods leave what they found, thread by thread, and ask what the caller wants of them now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vltok.method import Method

Knobs = list[tuple["Method", "Method"]]  # each method, and the same with other settings


class _OfThread(threading.local):
    """What one thread found in its last call, and the settings it wants; freed with the thread."""

    def __init__(self) -> None:
        self.results: dict[str, Any] | None = None  # None until this thread makes a call
        self.losses: dict[str, torch.Tensor] = {}
        self.knobs: list[Knobs] = []


class Run:
    """What the attached methods computed in the last call of each thread, and what is the same for all calls.

    A thread that made no call of its own sees those of the thread that left a result last, so that the thread which
    starts `Thread(target=model.generate)` can report on it. Only `fact`s are copied and pickled with a model.
    """

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._own = _OfThread()
        self._latest: tuple[dict[str, Any], dict[str, torch.Tensor]] = ({}, {})

    def __getstate__(self) -> dict[str, Any]:
        return {"_facts": self._facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def fact(self, name: str, value: Any) -> None:
        """Leave what holds for every call of every thread for `handle.report()`; a result of that name hides it."""
        self._facts[name] = value

    def report(self, name: str, value: Any) -> None:
        """Leave a result of this thread's call for `handle.report()`."""
        results, _ = self._begun()
        results[name] = value

    def loss(self, name: str, value: torch.Tensor) -> None:
        """Leave a loss term of this thread's call (a scalar with its graph) for `handle.loss()`."""
        self.losses[name] = value

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The loss terms of this thread's call, by name; to be changed in place by the method that left one."""
        return self._begun()[1]

    def last_results(self) -> dict[str, Any]:
        """Facts and the results of the last call, of this thread where it made one."""
        own = self._own.results
        return {**self._facts, **(self._latest[0] if own is None else own)}

    def last_losses(self) -> dict[str, torch.Tensor]:
        """The loss terms of the last call, of this thread where it made one."""
        return dict(self._latest[1] if self._own.results is None else self._own.losses)

    def _begun(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if self._own.results is None:
            self._own.results = {}
        self._latest = self._own.results, self._own.losses
        return self._latest

    def current(self, method: Method) -> Method:
        """The method with the settings that this thread wants now, see `handle.using`."""
        if self._own.knobs:
            return next((now for each, now in self._own.knobs[-1] if each == method), method)
        return method

    @contextmanager
    def using(self, knobs: Knobs) -> Iterator[None]:
        """Let `current` give other methods to this thread in this block."""
        stack = self._own.knobs
        stack.append(knobs)
        try:
            yield
        finally:  # of a generator's block, perhaps out of order or in another thread
            stack[:] = [each for each in stack if each is not knobs]
