"""The ledger of changes to a model: everything a method does to it is written here and undone in reverse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vltok.errors import EditConflictError

_ABSENT = object()


@dataclass
class _Edit:
    """One change: how to undo it, and for a named part how to see that it is still the last one made there."""

    undo: Callable[[], None]
    owner: object = None
    kind: str = ""
    name: str = ""
    is_in_place: Callable[[], bool] = lambda: True


class Edits:
    """Hooks, swaps, added children and set attributes, undone in reverse order by one call.

    Every change a method makes to a model goes through this object. `undo` checks first that nothing on top of these
    changes would be torn out, and raises without touching the model if so.
    """

    def __init__(self) -> None:
        self._edits: list[_Edit] = []
        self._added: list[nn.Module] = []
        self._hooks: Counter[nn.Module] = Counter()  # how many of these edits' hooks are on a module

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def added_modules(self) -> tuple[nn.Module, ...]:
        """Modules these edits brought into the model; their weights are what `vltok.save` writes."""
        return tuple(self._added)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before the module's forward; it may return new (args, kwargs)."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._hooks[module] += 1
        self._edits.append(_Edit(handle.remove))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, kwargs, output)` after the module's forward; it may return a new output.

        Args:
            module: The module to watch.
            hook: The hook.
            always: Call it also when the forward raised.
        """
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always)
        self._hooks[module] += 1
        self._edits.append(_Edit(handle.remove))

    def swap(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the child `parent.name`; train or eval mode goes with the place.

        A later handle that hooks the new module would go on watching it after it left, so that handle must go first.
        """
        old = parent.get_submodule(name)
        module.train(old.training)
        setattr(parent, name, module)
        self._added.append(module)

        def undo() -> None:
            old.train(module.training)
            setattr(parent, name, old)

        hooks = _count_hooks(module) - self._hooks[module]

        def is_in_place() -> bool:
            is_last = _count_hooks(module) == hooks + self._hooks[module]
            return is_last and getattr(parent, name, None) is module

        self._edits.append(_Edit(undo, parent, "child", name, is_in_place))

    def add_child(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Register `module` as a further child of `parent`.

        Raises:
            EditConflictError: If `parent` already has an attribute of that name.
        """
        if hasattr(parent, name):
            raise EditConflictError(
                f"{type(parent).__name__} already has {name!r}; remove the handle that added it first"
            )
        parent.add_module(name, module.train(parent.training))
        self._added.append(module)
        self._edits.append(
            _Edit(lambda: delattr(parent, name), parent, "child", name, lambda: getattr(parent, name, None) is module)
        )

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Set `target.name = value`; undone to the old value, or to no own attribute where there was none."""
        old = vars(target).get(name, _ABSENT)
        setattr(target, name, value)

        def undo() -> None:
            if old is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, old)

        self._edits.append(_Edit(undo, target, "attribute", name, lambda: getattr(target, name, _ABSENT) is value))

    def at_undo(self, action: Callable[[], None]) -> None:
        """Call `action` when the changes made so far are taken back, after those made later."""
        self._edits.append(_Edit(action))

    def undo(self) -> None:
        """Take all changes back, last one first. Does nothing the second time.

        Raises:
            EditConflictError: If a later change sits on top of one of these; the model is left as it is.
        """
        # Of several changes to one part only the last can be seen; the others lie under it, as they should.
        for edit in {(id(edit.owner), edit.name): edit for edit in self._edits}.values():
            if not edit.is_in_place():
                raise EditConflictError(
                    f"the {edit.kind} {edit.name!r} of {type(edit.owner).__name__} was changed again after this handle "
                    "was made; remove the later handle first"
                )
        while self._edits:
            self._edits.pop().undo()
        self._added.clear()
        self._hooks.clear()


def _count_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
