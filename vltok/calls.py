"""Which threads are inside a model right now, read from their stacks, so that an interrupt leaves nothing behind."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, dropwhile, repeat, tee
from operator import call, itemgetter, methodcaller
from types import FrameType
from typing import Any

import torch
from torch import nn

from vltok.errors import EditConflictError

PATIENCE = 60.0  # seconds
_PAUSE = 0.002
_DEEPEST = 500  # frames of a stack that are looked at
_CALL = "_call_impl"  # nn.Module's, around forward and hooks
_GENERATE = "generate"
_READING = threading.Lock()  # one thread reads stacks at a time


class Calls:
    """The calls of a model, in all threads.

    A thread is inside the model while it runs a method of the host or of a part of it, or while it calls a model around
    it or runs its generate().

    Args:
        host: The model.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self._open = threading.Event()
        self._open.set()

    def __getstate__(self) -> dict[str, Any]:
        return {"host": self.host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @contextmanager
    def paused(self, patience: float = PATIENCE) -> Iterator[None]:
        """Run a block while no other thread is inside; calls that begin meanwhile wait for its end.

        Args:
            patience: How long to wait for calls under way, in seconds.

        Raises:
            EditConflictError: If one still is after that, or if this thread is inside.
        """
        if self._is_inside(_stack(sys._getframe())):
            raise EditConflictError(
                "methods can't be taken off a model from inside one of its calls (by a hook, a streamer, a stopping "
                "criterion); remove the handle after the call"
            )
        deadline = time.monotonic() + patience
        self._open.clear()
        try:
            while busy := self._busy_threads():
                if time.monotonic() > deadline:
                    raise EditConflictError(
                        f"a call of the model is still under way in thread {', '.join(busy)} after {patience:.0f} s, "
                        "and would go on without the methods; remove the handle when it has finished"
                    )
                time.sleep(_PAUSE)
            yield
        finally:
            self._open.set()

    def before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the host: hold the call back while others are paused, unless it is part of one under way."""
        if torch.compiler.is_compiling() or self._open.is_set():
            return
        stack = dropwhile(lambda frame: not self._is_call_of_host(frame), _stack(sys._getframe()))
        next(stack, None)  # this very call
        if not self._is_inside(stack):
            self._hold()

    def _hold(self) -> None:
        self._open.wait()

    def _is_call_of_host(self, frame: FrameType) -> bool:
        return frame.f_code.co_name == _CALL and _owner(frame) is self.host

    def _busy_threads(self) -> list[str]:
        """Names of the other threads that are inside, and neither held back nor waiting as this one does."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        waiting = {Calls._hold.__code__, Calls._busy_threads.__code__, _PAUSED}
        parts, around = set(self.host.modules()), _Around(self.host)
        busy = []
        for number, frames in _stacks():
            if number == threading.get_ident() or any(frame.f_code in waiting for frame in frames):
                continue
            for frame in frames:
                owner = _owner(frame)
                is_call = frame.f_code.co_name in (_CALL, _GENERATE)
                if owner is not None and (owner in parts or (is_call and around.has(owner))):
                    busy.append(names.get(number, str(number)))
                    break
        return busy

    def _is_inside(self, stack: Iterator[FrameType]) -> bool:
        """Whether a stack runs a part of the host, or the generate() of transformers on it.

        Other methods of models around it may well put methods on for a while and take them off again.
        """
        parts, around = set(self.host.modules()), _Around(self.host)
        for frame in stack:
            owner, name = _owner(frame), frame.f_code.co_name
            if owner is not None and name == _CALL and owner in parts:
                return True
            is_theirs = name == _GENERATE and frame.f_globals.get("__name__", "").startswith("transformers.")
            if owner is not None and is_theirs and around.has(owner):
                return True
        return False


_PAUSED = Calls.paused.__wrapped__.__code__


class _Around:
    """Says of modules whether they hold the host."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self._known: dict[nn.Module, bool] = {}

    def has(self, module: nn.Module) -> bool:
        if module not in self._known:
            self._known[module] = any(part is self.host for part in module.modules())
        return self._known[module]


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from the innermost to the outermost."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stacks() -> list[tuple[int, list[FrameType]]]:
    """The frames of every thread, from the innermost to the outermost, no deeper than `_DEEPEST`.

    All threads hold still meanwhile: nothing here but builtins runs, in one call, so none gets its turn. In Python 3.11
    what a frame says was before it means nothing once a generator that it runs has been left. No garbage is collected
    either: its finalizers would run, and in Python before 3.12 one that needs the interpreter's lock on its threads, as
    `threading.local` does, would wait for ever, since `sys._current_frames` holds it.
    """
    threads = chain.from_iterable(map(methodcaller("items"), map(call, [sys._current_frames])))
    numbers, level = tee(threads)
    level = map(itemgetter(1), level)
    levels = []
    for _ in range(_DEEPEST):
        own, level = tee(level)
        levels.append(own)
        level = map(getattr, level, repeat("f_back"), repeat(None))
    pairs = zip(map(itemgetter(0), numbers), zip(*levels, strict=False), strict=False)
    with _READING:
        collects = gc.isenabled()
        gc.disable()
        try:
            found = list(pairs)
        finally:
            if collects:
                gc.enable()
    return [(number, [frame for frame in frames if frame is not None]) for number, frames in found]


def _owner(frame: FrameType) -> nn.Module | None:
    """The module whose method a frame runs."""
    if frame.f_code.co_varnames[:1] != ("self",):
        return None
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, nn.Module) else None
