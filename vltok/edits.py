"""The ledger of changes to a model: everything a method does to it is written here and undone in reverse.

A change is plain data: the module, the table or name, and what was there before. So a ledger is copied and pickled
together with its model, and the copy acts on the copied modules.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from vltok.errors import EditConflictError

# The tables of a module that know a hook by its key, the one with the hook itself first.
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Edit(Protocol):
    """One change to a model."""

    def undo(self) -> None:
        """Take it back. Harmless the second time, as an interrupt may have come after the first."""


class _NamedEdit(_Edit, Protocol):
    """A change to a part that has a name, which a later change may stand on top of."""

    owner: object
    name: str
    kind: str

    def is_in_place(self, ledger: Iterable[_Edit]) -> bool:
        """Whether it is still the last change there."""


@dataclass(eq=False)
class Hook:
    """A hook on a module.

    Attributes:
        module: The module it was put on.
        tables: The tables of the module that know it.
        key: Its key there.
    """

    module: nn.Module
    tables: tuple[str, ...]
    key: int

    @property
    def is_on(self) -> bool:
        """Whether the module still has the hook. It says nothing of whether the model still has the module."""
        return self.key in getattr(self.module, self.tables[0])

    def undo(self) -> None:
        for table in self.tables:
            getattr(self.module, table).pop(self.key, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # In the process that loads this, a hook that came later would otherwise get the same key, and replace this one.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.key + 1)


@dataclass(eq=False)
class _Swap:
    """`module` in the place of the child `owner.name`, which was `old`."""

    owner: nn.Module
    name: str
    module: nn.Module
    old: nn.Module
    hooks: int  # of others that were on `module` already
    kind = "child"

    def is_in_place(self, ledger: Iterable[_Edit]) -> bool:
        own = sum(isinstance(edit, Hook) and edit.module is self.module and edit.is_on for edit in ledger)
        is_last = _count_hooks(self.module) == self.hooks + own
        return is_last and getattr(self.owner, self.name, None) is self.module

    def undo(self) -> None:
        self.old.train(self.module.training)
        setattr(self.owner, self.name, self.old)


@dataclass(eq=False)
class _Child:
    """`module` as a further child `owner.name`."""

    owner: nn.Module
    name: str
    module: nn.Module
    kind = "child"

    def is_in_place(self, ledger: Iterable[_Edit]) -> bool:
        return getattr(self.owner, self.name, None) is self.module

    def undo(self) -> None:
        if self.is_in_place(()):
            delattr(self.owner, self.name)


@dataclass(eq=False)
class _Attribute:
    """`owner.name = value`, where `old` holds the object's own value from before, or nothing."""

    owner: object
    name: str
    value: Any
    old: tuple[Any, ...]
    kind = "attribute"

    def is_in_place(self, ledger: Iterable[_Edit]) -> bool:
        there = getattr(self.owner, self.name, self)
        # Numbers and words that were pickled twice come back as two objects.
        is_plain = isinstance(there, int | float | str) and type(there) is type(self.value)
        return there is self.value or (is_plain and there == self.value)

    def undo(self) -> None:
        _put_back(self.owner, self.name, self.old)


@dataclass(eq=False)
class _Wrapped:
    """A wrapper in the place of the method `owner.name`."""

    owner: object
    name: str
    wrapper: MethodWrapper

    def undo(self) -> None:
        self.wrapper.is_on = False
        there = vars(self.owner).get(self.name)
        if there is self.wrapper:
            _put_back(self.owner, self.name, self.wrapper.under)
            return
        while isinstance(there, MethodWrapper):  # that of a later handle stands on this one
            if there.under and there.under[0] is self.wrapper:
                there.under = self.wrapper.under
                return
            there = there.under[0] if there.under else None


@dataclass(eq=False)
class _Entry:
    """`value` at the end of the list `owner.name`, which exists as long as it has entries."""

    owner: object
    name: str
    value: Any

    def undo(self) -> None:
        entries = vars(self.owner).get(self.name, [])
        entries[:] = [entry for entry in entries if entry is not self.value]
        if not entries and self.name in vars(self.owner):
            delattr(self.owner, self.name)


@dataclass(eq=False)
class _Action:
    """Something else to do at undo."""

    undo: Callable[[], None]


class MethodWrapper:
    """Stands on an object in the place of one of its methods, see `Edits.wrap_method`.

    A subclass defines `around`. What is underneath is looked up at each call, on the object that the wrapper stands on,
    so a wrapper on a deepcopy of the object calls the copy's own. After the undo it only passes calls on, as somebody
    may still hold it.

    Attributes:
        owner: The object.
        name: Of the method.
        under: The attribute of the object that it stands on, or nothing if that is the method of the class.
        is_on: Whether it was not undone yet.
    """

    owner: Any
    name: str
    under: tuple[Callable[..., Any], ...] = ()
    is_on: bool = False

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method, which some callers look at."""
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what the wrapper is for; `call` is what is underneath."""
        raise NotImplementedError(f"{type(self).__name__} must define around()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.under[0] if self.under else getattr(type(self.owner), self.name).__get__(self.owner)
        return self.around(call, *args, **kwargs) if self.is_on else call(*args, **kwargs)


class Edits:
    """Hooks, swaps, added children, set attributes and wrapped methods, undone in reverse order by one call.

    Every change a method makes to a model goes through this object; it may also be made later, while the method is on,
    and from any thread. `undo` checks first that nothing on top of these changes would be torn out, and raises without
    touching the model if so.

    It is copied and pickled with the model. If a part of the host is copied by itself, as PEFT does with
    `modules_to_save`, what holds a ledger there gets an empty one.

    Args:
        host: What the changes are made to; None if that is of no matter.
    """

    def __init__(self, host: nn.Module | None = None) -> None:
        self._host = host
        self._edits: list[_Edit] = []
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._edits)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"_host": self._host, "_edits": list(self._edits)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> Edits:
        twin = memo[id(self)] = Edits()
        # Modules are copied from the outside to the inside, so a part that comes before its host comes alone.
        if self._host is None or id(self._host) in memo or not any(id(part) in memo for part in self._host.modules()):
            twin._host = copy.deepcopy(self._host, memo)  # first: another ledger of this host may be met on the way
            with self._lock:
                edits = list(self._edits)
            twin._edits = copy.deepcopy(edits, memo)
        return twin

    @property
    def added_modules(self) -> tuple[nn.Module, ...]:
        """Modules these edits brought into the model; their weights are what `vltok.save` writes."""
        return tuple(edit.module for edit in list(self._edits) if isinstance(edit, _Swap | _Child))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> Hook:
        """Call `hook(module, args, kwargs)` before the module's forward; it may return new (args, kwargs)."""
        with self._lock:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            return self._note(Hook(module, _BEFORE, handle.id))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, first: bool = False) -> Hook:
        """Call `hook(module, args, kwargs, output)` after the module's forward; it may return a new output.

        Args:
            module: The module to watch.
            hook: The hook.
            always: Call it also when the forward raised.
            first: Call it before the hooks that are there already, so that all others see its output.
        """
        with self._lock:
            handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=first)
            return self._note(Hook(module, _AFTER, handle.id))

    def drop(self, hook: Hook) -> None:
        """Take one hook off before the others, such as one on a module that the model no longer has."""
        with self._lock:
            hook.undo()
            self._edits = [edit for edit in self._edits if edit is not hook]

    def swap(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the child `parent.name`; train or eval mode goes with the place.

        A later handle that hooks the new module would go on watching it after it left, so that handle must go first.
        """
        with self._lock:
            old = parent.get_submodule(name)
            own = sum(isinstance(edit, Hook) and edit.module is module and edit.is_on for edit in self._edits)
            module.train(old.training)
            setattr(parent, name, module)
            self._note(_Swap(parent, name, module, old, _count_hooks(module) - own))

    def add_child(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Register `module` as a further child of `parent`.

        Raises:
            EditConflictError: If `parent` already has an attribute of that name.
        """
        with self._lock:
            if hasattr(parent, name):
                raise EditConflictError(
                    f"{type(parent).__name__} already has {name!r}; remove the handle that added it first"
                )
            parent.add_module(name, module.train(parent.training))
            self._note(_Child(parent, name, module))

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Set `target.name = value`; undone to the old value, or to no own attribute where there was none."""
        with self._lock:
            old = _own(target, name)
            setattr(target, name, value)
            self._note(_Attribute(target, name, value, old))

    def wrap_method(self, target: object, name: str, wrapper: MethodWrapper) -> None:
        """Put `wrapper` in the place of the method `target.name`, as an attribute of the object itself.

        It may stand on top of another attribute, and others may come on top of it. If something else is in its place at
        the undo, that stays, and calls through the wrapper from then on.
        """
        with self._lock:
            wrapper.owner, wrapper.name, wrapper.under = target, name, _own(target, name)
            wrapper.is_on = True
            wrapper.__doc__ = getattr(target, name).__doc__
            setattr(target, name, wrapper)
            self._note(_Wrapped(target, name, wrapper))

    def list_on(self, target: object, name: str, value: Any) -> None:
        """Add `value` to the list `target.name`, made if it is missing; several ledgers may do so in any order."""
        with self._lock:
            if name not in vars(target):
                setattr(target, name, [])
            vars(target)[name].append(value)
            self._note(_Entry(target, name, value))

    def at_undo(self, action: Callable[[], None]) -> None:
        """Call `action` when the changes made so far are taken back, after those made later.

        Args:
            action: Copied and pickled with the ledger: a function of a module, a partial of one, or a method bound to
                an object.

        Raises:
            TypeError: If it is a function with a closure, which would hold on to the original in a copy.
        """
        if getattr(action, "__closure__", None):
            raise TypeError(f"{action.__qualname__} has a closure, which isn't copied with a model; give a partial")
        with self._lock:
            self._note(_Action(action))

    def undo(self) -> None:
        """Take all changes back, last one first. Does nothing the second time.

        A hook whose module was replaced or copied meanwhile is taken off wherever the host has it.

        Raises:
            EditConflictError: If a later change sits on top of one of these; the model is left as it is.
        """
        with self._lock:
            # Of several changes to one part only the last can be seen; the others lie under it, as they should.
            named: list[_NamedEdit] = [edit for edit in self._edits if isinstance(edit, _Swap | _Child | _Attribute)]
            for edit in {(id(edit.owner), edit.name): edit for edit in named}.values():
                if not edit.is_in_place(self._edits):
                    raise EditConflictError(
                        f"the {edit.kind} {edit.name!r} of {type(edit.owner).__name__} was changed again after this "
                        "handle was made; remove the later handle first, or put back what replaced or wrapped it"
                    )
            hooks = [edit for edit in self._edits if isinstance(edit, Hook)]
            while self._edits:
                self._edits[-1].undo()
                self._edits.pop()
            if self._host is not None:
                _take_off_copies(hooks, self._host)

    def _note(self, edit: Any) -> Any:
        self._edits.append(edit)
        return edit


def _count_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _take_off_copies(hooks: list[Hook], host: nn.Module) -> None:
    """Take hooks off the copies of their modules that a host may have; keys are unique, so what bears one is a copy."""
    keys = {hook.key for hook in hooks}
    for part in host.modules():
        for table in (*_BEFORE, *_AFTER):
            for key in keys.intersection(getattr(part, table)):
                del getattr(part, table)[key]


def _own(target: object, name: str) -> tuple[Any, ...]:
    """The object's own attribute of that name in a tuple, which is empty where the class has it, or nobody."""
    return (vars(target)[name],) if name in vars(target) else ()


def _put_back(target: object, name: str, old: tuple[Any, ...]) -> None:
    if old:
        setattr(target, name, old[0])
    elif name in vars(target):
        delattr(target, name)
