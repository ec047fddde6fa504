"""The call of a vision tower: which pictures a tensor inside the tower comes from.

A hook knows the tensors it is given and the thread it runs in, and neither is enough. A backward pass that recomputes
checkpointed blocks runs in another thread on GPUs, and after other pictures have passed; a hook may send further
pictures through the tower meanwhile; an interrupt may break off a call anywhere. So a call is filed under the storages
of the tensors that carry it, which a recomputation starts from again, and handed on from the input of a block or norm
to its output. Only from the patches to the first block, and where a tensor has no storage, the thread tells.

    patch layer   begin   a call, with the layout of the patches: the newest of this thread
    first block   enter   its input belongs to the newest call that no block has seen
    block, norm   carry   the output belongs to the call of the input
    last block    finish  the call that this one ran inside is the newest again
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vltok.engine.tower_layout import Layout, SideBySide
from vltok.errors import UnsupportedInputError
from vltok.recompute import current_pass
from vltok.tokens import Grid

Reader = Callable[[nn.Module, tuple, dict[str, Any], torch.Tensor], Layout]
_DEEPEST = 8  # calls inside calls that are remembered; more are left over from calls that were broken off


class TowerHook:
    """What hangs on a part of a tower by hooks.

    A copy of that part gets its own. A copy of less, such as adapters make of the modules they train, shares it: that
    copy stands in the same tower.

    Args:
        owner: The part.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> nn.Module:
        """The part it hangs on."""
        return self._owner()

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerHook:
        if id(self.owner) not in memo:
            return self
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _owner=weakref.ref(state["_owner"]))


@dataclass(frozen=True, eq=False)
class Merged:
    """How a block merged tokens.

    Attributes:
        groups: Which of the tokens that leave the block each one that entered went into, (B, N), int64.
        sizes: How many tokens of the first block each that leaves stands for, (B, K), float32.
        source: Which of these each token of the first block went into, (B, prefix + patches), int64.
    """

    groups: torch.Tensor
    sizes: torch.Tensor
    source: torch.Tensor

    def to(self, device: torch.device) -> Merged:
        """The same on another device, as blocks may be on several."""
        if self.groups.device == device:
            return self
        return Merged(self.groups.to(device), self.sizes.to(device), self.source.to(device))


class TowerCall:
    """One batch of pictures on its way through a tower.

    Attributes:
        layout: Where the pictures are among its tokens.
        outer: The call that this one runs inside, if there is one.
        depth: How many it runs inside.
        is_entered: Whether its tokens have reached the first block.
        merged: How blocks merged tokens, by their numbers.
    """

    __slots__ = ("__weakref__", "depth", "is_entered", "layout", "merged", "outer")

    def __init__(self, layout: Layout, outer: TowerCall | None) -> None:
        self.layout = layout
        self.outer = outer if outer is None or outer.depth < _DEEPEST else None
        self.depth = 0 if self.outer is None else self.outer.depth + 1
        self.is_entered = False
        self.merged: dict[int, Merged] = {}


class TowerCalls(TowerHook):
    """Finds the call that tokens in a tower belong to.

    Args:
        tower: The tower.
        read: Reads the layout off a call of the patch layer, given that, its arguments, keyword arguments and output.
    """

    def __init__(self, tower: nn.Module, read: Reader) -> None:
        super().__init__(tower)
        self._read = read
        self._start_empty()

    def _start_empty(self) -> None:
        self._thread = threading.local()  # newest: the pass it was made in, and the newest call
        self._filed: weakref.WeakKeyDictionary[Any, TowerCall] = weakref.WeakKeyDictionary()
        self._grids: set[Grid] = set()  # that ever passed

    def __getstate__(self) -> dict[str, Any]:
        return {"_owner": self.owner, "_read": self._read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_empty()

    # Hooks

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        """After the patch layer, whose call tells where the pictures are."""
        layout = self._read(module, args, kwargs, output)
        if torch.compiler.is_compiling():
            self._thread.newest = (current_pass(), TowerCall(layout, None))
        else:
            self._thread.newest = (current_pass(), TowerCall(layout, self.newest()))
            if not isinstance(layout, SideBySide):
                self._grids.add(layout)

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the first block."""
        if torch.compiler.is_compiling():
            return
        call = self.newest()
        while call is not None and call.is_entered:
            call = call.outer
        if call is None:  # a recomputation, or a block that was called by itself
            return
        call.is_entered = True
        self._file(tokens_in(args, kwargs), call)

    def carry(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After a block or a norm."""
        self.hand_on(tokens_in(args, kwargs), output[0] if isinstance(output, tuple) else output)

    def finish(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the last block."""
        call = self.newest()
        self._thread.newest = (current_pass(), None if call is None else call.outer)

    # Questions

    def newest(self) -> TowerCall | None:
        """The newest call of this thread, if it was made in the same pass, forward or backward."""
        made_in, call = getattr(self._thread, "newest", (None, None))
        return call if made_in == current_pass() else None

    def call_of(self, tokens: torch.Tensor) -> TowerCall | None:
        """The call that tokens belong to, None if nothing tells."""
        return self._filed_call(tokens) or self.newest()

    def hand_on(self, tokens: torch.Tensor, made: torch.Tensor) -> None:
        """Note that one tensor was made from another, which is in the tower."""
        if torch.compiler.is_compiling():
            return
        call = self._filed_call(tokens)
        if call is not None:
            self._file(made, call)

    def layout_of(self, tokens: torch.Tensor, num_prefix_tokens: int) -> Layout:
        """Where the pictures are among tokens, (B, N, C), of which the first few of each row are none of theirs.

        Raises:
            UnsupportedInputError: If nothing tells which pictures they come from, and several grids, or none, have so
                many patches.
        """
        patches = tokens.shape[1] - num_prefix_tokens
        call = self._filed_call(tokens)
        if call is None:
            call = self.newest()
            if call is not None and not torch.compiler.is_compiling() and not _has(call.layout, tokens, patches):
                call = None
        if call is not None:
            return call.layout
        fitting = [grid for grid in tuple(self._grids) if grid[0] * grid[1] == patches]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UnsupportedInputError(
                f"images with grids {fitting[0]} and {fitting[1]} have passed through this vision tower, and nothing "
                f"tells which of them {patches} tokens are recomputed from, as they were copied or moved since; call "
                "backward() before images of another shape pass, or turn gradient checkpointing off"
            )
        raise UnsupportedInputError(
            f"{patches} tokens came into a block of this vision tower, and no images of so many patches have passed "
            "through its patch layer; call the whole tower, with images"
        )

    def _filed_call(self, tokens: torch.Tensor) -> TowerCall | None:
        if torch.compiler.is_compiling():
            return None
        storage = _storage(tokens)
        return None if storage is None else self._filed.get(storage)

    def _file(self, tokens: torch.Tensor, call: TowerCall) -> None:
        storage = _storage(tokens)
        if storage is not None:
            self._filed[storage] = call
        self._thread.newest = (current_pass(), call)


def tokens_in(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a block, norm or attention is called with first."""
    return args[0] if args else next(iter(kwargs.values()))


def _has(layout: Layout, tokens: torch.Tensor, patches: int) -> bool:
    """Whether tokens may be those of a layout, by their number."""
    if isinstance(layout, SideBySide):
        return tuple(tokens.shape[:2]) == layout.size
    return layout[0] * layout[1] == patches


def _storage(tokens: torch.Tensor) -> Any:
    """The memory of a tensor, one object for all its views; None inside transforms of torch.func, which have none."""
    try:
        return tokens.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
