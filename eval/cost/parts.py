"""Where the time of an answer goes: hooks on a model's parts, each of which counts what no part inside it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

import vltok
from vltok import families

PARTS = ("tower", "projector", "selector", "prefill", "decode", "other")
# What makes visual tokens of the tower's features: modules of the model, or of the tower itself.
PROJECTORS = (
    "multi_modal_projector",
    "mm_projector",
    "projector",
    "connector",
    "aligner",
    "merger",
    "deepstack_merger_list",
)


@dataclass(frozen=True)
class Parts:
    """The parts of a model; the modules of the projector may be inside the tower, or none known by name."""

    tower: nn.Module
    projector: list[nn.Module]
    decoder: nn.Module


def find_parts(model: nn.Module) -> Parts:
    """Find the parts, or raise `vltok.UnsupportedModelError` if vltok knows no such model."""
    view = families.view(model, None)
    tower = view.family.tower(view.host)
    children = [*view.host.named_children(), *tower.named_children()]
    projector = [child for name, child in children if name in PROJECTORS]
    return Parts(tower, projector, view.family.decoder(view.host))


class Sections:
    """Seconds by name. While a section is inside another one, the outer one stands still, so that all add up.

    Attributes:
        seconds: By name.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._open, self._since = clock, [], 0.0
        self.seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """Begin a section."""
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        """End the section that began last."""
        self._count()
        self._open.pop()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """The block is a section."""
        self.enter(name)
        yield
        self.leave()

    def _count(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def watch(model: nn.Module, handle: vltok.Handle | None, sections: Sections) -> Iterator[None]:
    """Let the parts of a model tell when they begin and end; everything else within `sections` is in "other".

    The first call of the model is "prefill", later ones are "decode". The selector is the picking alone: what it wants
    read in the tower or computed in the decoder is in their time.
    """
    parts, calls = find_parts(model), []

    def begin(*_: Any) -> None:
        sections.enter("decode" if calls else "prefill")
        calls.append(1)

    def end(*_: Any) -> None:
        sections.leave()

    with ExitStack() as stack:
        named = [(parts.tower, "tower"), *((each, "projector") for each in parts.projector)]
        for module, name in named:
            # A list of projectors is never called itself.
            for each in module if isinstance(module, nn.ModuleList) else [module]:
                enter = each.register_forward_pre_hook(lambda *_, name=name: sections.enter(name), prepend=True)
                stack.callback(enter.remove)
                stack.callback(each.register_forward_hook(end).remove)
        stack.callback(model.register_forward_pre_hook(begin, prepend=True).remove)
        stack.callback(model.register_forward_hook(end).remove)
        for method in handle.methods if handle else ():
            verb = "pick" if isinstance(method, vltok.Selector) else "keep"
            if hasattr(method, verb):
                stack.enter_context(
                    mock.patch.object(type(method), verb, _timed(getattr(type(method), verb), sections))
                )
        yield


def _timed(function: Callable[..., Any], sections: Sections) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with sections.section("selector"):
            return function(*args, **kwargs)

    return run
