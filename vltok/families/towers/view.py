"""TowerView: a vision tower as methods see it, how a block gets another attention, and the grid of its pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.attention import MapRecorder, TowerReader, find_attention, read_attention, tokens_of, watch
from vltok.engine.guard import mark_checkpoint
from vltok.errors import UnsupportedModelError
from vltok.families import unsupported
from vltok.families.towers.base import TowerFamily
from vltok.method import Run
from vltok.recompute import is_recomputing, statistics_kept
from vltok.views import DecoderRule, ProjectorSite, ScoreWatcher, SelfAttention, TokenSelector, VisionView

_FLAG = "_output_capturing_hooks_installed"
_HOOK = "output_capturing_hook"


class TowerView(VisionView):
    """A vision tower, its parts found by its family."""

    def __init__(self, family: TowerFamily, tower: nn.Module, model: nn.Module) -> None:
        self.family = family
        self._model = model
        self.host = tower
        self.restore: dict[str, Any] = {}  # what fields of the tower's config held before
        self._config = family.config(tower, model)
        self._patches = family.patch_layer(tower)
        if self._patches is None:
            raise UnsupportedModelError(
                f"{type(tower).__name__} makes no patches by a convolution, from which vltok learns the grid they form"
            )
        self._blocks = family.blocks(tower)
        self.dim = family.dim(tower)
        self.depth = len(self._blocks)
        self.grid = family.grid(tower)
        self.num_prefix_tokens = family.num_prefix_tokens(tower)
        self._grids: GridRecorder | None = None
        self._swaps = False

    @property
    def vision(self) -> VisionView:
        return self

    def attention_module(self, block: int) -> nn.Module:
        return self._blocks[block].get_submodule(self._attention_name(block))

    def self_attention(self, block: int) -> SelfAttention:
        self.family.check_attention(self.host)
        return read_attention(self.attention_module(block), self.dim)

    def swap_attention(self, edits: Edits, block: int, module: nn.Module) -> None:
        old = self.attention_module(block)
        for part in old.modules():
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            if any(isinstance(getattr(hook, "__self__", None), TowerReader) for hook in hooks):
                raise ValueError(
                    f"the attention of block {block} is being watched by a pruning method; replace the attention "
                    "first: vltok.apply(model, [attention method, pruning method])"
                )
        grids = self._record_grids(edits)
        if not self._swaps:
            restore_output_capture(edits, self.host)
            self._swaps = True
        edits.swap(self._blocks[block], self._attention_name(block), module)
        edits.before(module, grids.supply)
        if self.family.returns_maps:
            edits.after(module, _with_map)

    def pool_before_attention(self, edits: Edits, block: int, name: str, module: nn.Module) -> None:
        norm = getattr(self._blocks[block], self.family.first_norm, None)
        if norm is None:
            raise UnsupportedModelError(
                f"{type(self._blocks[block]).__name__}, block {block} of this vision tower, has no "
                f"{self.family.first_norm} before its attention, where tokens could be pooled"
            )
        self.family.check_norm(self._blocks[block])
        grids = self._record_grids(edits)
        edits.add_child(self._blocks[block], name, module)
        edits.before(norm, Pooler(module, grids, self.num_prefix_tokens).pool)

    def watch_scores(self, edits: Edits, blocks: Sequence[int], watcher: ScoreWatcher) -> None:
        self.family.check_attention(self.host)
        edits.before(self._patches, Starter(watcher).start)
        maps = self.family.shown_maps(self.host)
        for block in blocks:
            if maps:
                edits.after(maps[block], MapRecorder(block, watcher).show)
            else:
                watch(edits, block, self.attention_module(block), watcher)

    def mark_checkpoint(self, edits: Edits, settings: dict[str, Any]) -> None:
        """Note in the tower's config what is on it, so that a checkpoint saved meanwhile says how to load it."""
        if self._config is not None:
            mark_checkpoint(edits, self._config, settings, {"config": self.restore})

    def on_visual_tokens(self, edits: Edits, run: Run, selector: TokenSelector) -> None:
        raise unsupported(self._model)

    def on_decoder_layers(self, edits: Edits, run: Run, rule: DecoderRule) -> None:
        raise unsupported(self._model)

    def projector_site(self) -> ProjectorSite:
        raise unsupported(self._model)

    def _record_grids(self, edits: Edits) -> GridRecorder:
        """The recorder of this view, put on the tower when first needed, by a change that brings weights."""
        if self._grids is None:
            self._grids = GridRecorder()
            edits.after(self._patches, self._grids.record)
            self._guard_checkpoints(edits)
        return self._grids

    def _guard_checkpoints(self, edits: Edits) -> None:
        if self._config is not None:
            guard = self.family.guard(self._config)
            self.restore = {name: getattr(self._config, name) for name in guard}
            for name, value in guard.items():
                edits.set_attribute(self._config, name, value)

    def _attention_name(self, block: int) -> str:
        name = find_attention(self._blocks[block])
        if name is None:
            raise UnsupportedModelError(
                f"{type(self._blocks[block]).__name__}, block {block} of this vision tower, has no attention module "
                "with a number of heads and linear layers for queries, keys and values, such as ViTs of transformers "
                "and timm have; its attention can't be replaced"
            )
        return name


class GridRecorder:
    """Knows the grid of the pictures that are passing through a tower.

    A backward pass that recomputes checkpointed blocks may come after other pictures have passed. It finds the grid by
    the number of tokens among those passed since the last one.
    """

    def __init__(self) -> None:
        self._grid: tuple[int, int] | None = None
        self._pending: set[tuple[int, int]] = set()
        self._went_back = False

    def __deepcopy__(self, memo: dict[int, Any]) -> GridRecorder:
        copy = GridRecorder()
        memo[id(self)] = copy
        return copy

    def record(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """After the patch layer: the output, (B, C, H, W), has the grid."""
        self._grid = (output.shape[-2], output.shape[-1])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._went_back:
                self._pending.clear()
                self._went_back = False
            self._pending.add(self._grid)

    def supply(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before an attention: leave it the tokens, and add their grid."""
        tokens = tokens_of(module, args, kwargs)
        return (tokens, self.grid_of(tokens.shape[1] - module.num_prefix_tokens)), {}

    def grid_of(self, patches: int) -> tuple[int, int]:
        """The grid that so many patches form now.

        Raises:
            ValueError: If a backward pass recomputes, and pictures of two grids could be meant.
        """
        if is_recomputing():
            self._went_back = True
            fitting = [each for each in self._pending if each[0] * each[1] == patches]
            if len(fitting) > 1:
                raise ValueError(
                    f"pictures with grids {fitting[0]} and {fitting[1]} passed through the vision tower before this "
                    "backward pass, so it can't tell which it recomputes; call backward() after each, or turn gradient "
                    "checkpointing off"
                )
            return fitting[0] if fitting else self._grid
        return self._grid


class Pooler:
    """Stands before a norm, and pools what enters it; the residual path doesn't come this way."""

    def __init__(self, module: nn.Module, grids: GridRecorder, num_prefix_tokens: int) -> None:
        self.module = module
        self.grids = grids
        self.num_prefix_tokens = num_prefix_tokens

    def pool(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens, *rest = args
        grid = self.grids.grid_of(tokens.shape[1] - self.num_prefix_tokens)
        with statistics_kept(self.module) if is_recomputing() else contextlib.nullcontext():
            return (self.module(tokens, grid), *rest), kwargs


class Starter:
    """Tells a watcher that pictures enter the tower."""

    def __init__(self, watcher: ScoreWatcher) -> None:
        self.watcher = watcher

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.watcher.start()


def _with_map(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output, None


def restore_output_capture(edits: Edits, model: nn.Module) -> None:
    """At undo, take off the capturing hooks that transformers put on meanwhile.

    transformers puts them on all modules at once, the first time something is to be captured, and not on one that was
    swapped out then. Without them it does so again when it next needs them.
    """
    before = [module for module in model.modules() if getattr(module, _FLAG, False)]
    edits.at_undo(partial(_take_off_output_capture, model, before))


def _take_off_output_capture(model: nn.Module, before: Sequence[nn.Module]) -> None:
    for module in model.modules():
        if getattr(module, _FLAG, False) and module not in before:
            delattr(module, _FLAG)
            for part in module.modules():
                hooks = part._forward_hooks
                for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == _HOOK]:
                    del hooks[key]
