"""Hooks that tell modules in a vision tower the grid of the pictures at hand."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from vltok.engine.parts import tokens_of
from vltok.engine.tower_call import TowerCalls, TowerHook
from vltok.engine.tower_layout import SideBySide
from vltok.errors import UnsupportedInputError
from vltok.recompute import is_recomputing, statistics_kept


class Supplier(TowerHook):
    """Stands before an attention that takes a grid besides tokens, and supplies it."""

    def __init__(self, calls: TowerCalls) -> None:
        super().__init__(calls.owner)
        self.calls = calls

    def supply(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        tokens = tokens_of(attention, args, kwargs)
        return (tokens, self.calls.layout_of(tokens, attention.num_prefix_tokens)), {}


class Pooler(TowerHook):
    """Stands before the first norm of a block, and pools what enters it; the residual path doesn't come this way.

    The module that pools is looked up in the block at each call, as adapters may have wrapped it since.
    """

    def __init__(self, calls: TowerCalls, block: nn.Module, name: str, num_prefix_tokens: int) -> None:
        super().__init__(block)
        self.calls = calls
        self.name = name
        self.num_prefix_tokens = num_prefix_tokens

    def pool(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if getattr(norm, "_is_replica", False):
            raise UnsupportedInputError(
                "nn.DataParallel copies a vision tower without what hangs on its hooks, so tokens can't be pooled in "
                "its replicas; use DistributedDataParallel"
            )
        tokens, *rest = args
        module = getattr(self.owner, self.name)
        layout = self.calls.layout_of(tokens, self.num_prefix_tokens)
        with statistics_kept(module) if is_recomputing() else contextlib.nullcontext():
            pooled = layout.changed(tokens, module) if isinstance(layout, SideBySide) else module(tokens, layout)
        self.calls.hand_on(tokens, pooled)
        return (pooled, *rest), kwargs


def with_map(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> tuple:
    """After an attention, for a block that expects a map besides tokens: there is none."""
    return output, None
