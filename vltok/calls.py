"""Which threads are inside a model right now, read from their stacks, so that an interrupt leaves nothing behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from torch import nn

from vltok.errors import EditConflictError

PATIENCE = 60.0  # seconds
_PAUSE = 0.005
_CALL = "_call_impl"  # nn.Module's, around forward and hooks
_GENERATE = "generate"


def wait_for_calls(host: nn.Module, patience: float = PATIENCE) -> None:
    """Wait until no other thread is inside a model.

    A thread is inside while it runs a method of the host or of a part of it, or while it calls a model around it or
    runs its generate(). Threads that wait here themselves don't count.

    Args:
        host: The model.
        patience: How long to wait, in seconds.

    Raises:
        EditConflictError: If one still is after that, or if this thread is inside.
    """
    if _is_inside(sys._getframe(), host):
        raise EditConflictError(
            "methods can't be taken off a model from inside one of its calls (by a hook, a streamer, a stopping "
            "criterion); remove the handle after the call"
        )
    deadline = time.monotonic() + patience
    while busy := _busy_threads(host):
        if time.monotonic() > deadline:
            raise EditConflictError(
                f"a call of the model is still under way in thread {', '.join(busy)} after {patience:.0f} s, and would "
                "go on without the methods; remove the handle when it has finished"
            )
        time.sleep(_PAUSE)


def _busy_threads(host: nn.Module) -> list[str]:
    """Names of the other threads that are inside the model."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts, around = set(host.modules()), _Around(host)
    busy = []
    for number, top in sys._current_frames().items():
        frames = list(_stack(top))
        if number == threading.get_ident() or any(each.f_code is wait_for_calls.__code__ for each in frames):
            continue
        for frame in frames:
            owner = _owner(frame)
            is_call = frame.f_code.co_name in (_CALL, _GENERATE)
            if owner is not None and (owner in parts or (is_call and around.has(owner))):
                busy.append(names.get(number, str(number)))
                break
    return busy


def _is_inside(top: FrameType, host: nn.Module) -> bool:
    """Whether the stack that ends here runs a part of the host, or the generate() of transformers on it.

    Other methods of models around it may well put methods on for a while and take them off again.
    """
    parts, around = set(host.modules()), _Around(host)
    for frame in _stack(top):
        owner, name = _owner(frame), frame.f_code.co_name
        if owner is None:
            continue
        if name == _CALL and owner in parts:
            return True
        is_theirs = frame.f_globals.get("__name__", "").startswith("transformers.")
        if name == _GENERATE and is_theirs and around.has(owner):
            return True
    return False


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
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> nn.Module | None:
    """The module whose method a frame runs."""
    if frame.f_code.co_varnames[:1] != ("self",):
        return None
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, nn.Module) else None
