"""TowerView: a vision tower as methods see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.engine.guard import mark_checkpoint
from vltok.engine.parts import find_attention, is_nested, read_attention
from vltok.engine.token_merging import BlockMerger, is_merging
from vltok.engine.tower_attention import FeatureReader, TowerReader
from vltok.engine.tower_call import TowerCalls
from vltok.engine.watchers import CallWatch, MapRecorder, ScoreRecorder
from vltok.engine.weights import check_at_hand, place_of
from vltok.errors import UnsupportedModelError
from vltok.families import unsupported
from vltok.families.towers.base import TowerFamily
from vltok.families.towers.capture import refuse_maps, restore_output_capture
from vltok.families.towers.grids import Pooler, Supplier, with_map
from vltok.method import Run
from vltok.views import ProjectorSite, ScoreWatcher, SelfAttention, TokenMerger, VisionView
from vltok.visual import TokenRule, TokenSelector

_NEED_ALL_TOKENS = {
    Supplier: "attention that was replaced",
    Pooler: "pooling before attention",
    ScoreRecorder: "a loss on its attention",
    MapRecorder: "a loss on its attention",
    TowerReader: "a pruning method that reads its attention",
    FeatureReader: "a pruning method that reads its features",
}


def _found(part: nn.Module, kinds: dict[type, str]) -> str | None:
    """What hangs on a part by hooks, of some kinds of these."""
    hooks = (
        hook for each in part.modules() for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())
    )
    return next((kinds[type(hook.__self__)] for hook in hooks if type(getattr(hook, "__self__", None)) in kinds), None)


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
        self._calls: TowerCalls | None = None
        self._brings_weights = False
        self._swaps = False

    @property
    def vision(self) -> VisionView:
        return self

    def attention_module(self, block: int) -> nn.Module:
        return self._blocks[block].get_submodule(self._attention_name(block))

    def self_attention(self, block: int) -> SelfAttention:
        self.family.check_replaceable(self.host)
        return read_attention(self.attention_module(block), self.dim)

    def swap_attention(self, edits: Edits, block: int, module: nn.Module) -> None:
        self._check_unmerged()
        old = self.attention_module(block)
        self._check_unwatched(old, block)
        self._bring_weights(edits, self._blocks[block], block)
        if not self._swaps:
            restore_output_capture(edits, self.host)
            edits.before(self.host, refuse_maps)
            self._swaps = True
        edits.swap(self._blocks[block], self._attention_name(block), module)
        edits.before(module, Supplier(self._record_calls(edits)).supply)
        if self.family.returns_maps and not is_nested(old):
            edits.after(module, with_map)

    def pool_before_attention(self, edits: Edits, block: int, name: str, module: nn.Module) -> None:
        self._check_unmerged()
        owner = self._blocks[block]
        norm = getattr(owner, self.family.first_norm, None)
        if norm is None:
            raise UnsupportedModelError(
                f"{type(owner).__name__}, block {block} of this vision tower, has no {self.family.first_norm} before "
                "its attention, where tokens could be pooled"
            )
        self.family.check_norm(owner)
        attention = self.attention_module(block)
        self._bring_weights(edits, owner, block)
        device, dtype = place_of(attention, owner)
        edits.add_child(owner, name, module.to(device, dtype))
        edits.before(norm, Pooler(self._record_calls(edits), owner, name, self.num_prefix_tokens).pool)

    def watch_scores(self, edits: Edits, blocks: Sequence[int], watcher: ScoreWatcher) -> None:
        self._check_unmerged()
        self.family.check_scores(self.host)
        calls = self._record_calls(edits)
        watch, maps = CallWatch(calls, watcher), self.family.shown_maps(self.host)
        edits.after(self._patches, watch.start)
        for block in blocks:
            owner = self._blocks[block]
            if maps:
                edits.after(maps[block], MapRecorder(calls, block, watcher).show)
            else:
                attention, family = self.attention_module(block), self.family
                recorder = ScoreRecorder(calls, block, owner, attention, watcher, family.turn, family.is_masked)
                recorder.install(edits, attention)
            edits.after(owner, watch.leave, always=True)
        edits.after(self._blocks[-1], watch.finish)

    def merging_blocks(self) -> int:
        self.family.check_merging(self.host)
        return self.depth

    def merge_tokens(self, edits: Edits, run: Run, merges: Sequence[int], merger: TokenMerger) -> None:
        self.family.check_merging(self.host)
        self._check_alone()
        if not any(merges):
            return
        first, last = (pick(n for n, count in enumerate(merges) if count) for pick in (min, max))
        calls = self._record_calls(edits)
        for number in range(first, self.depth):
            block, attention = self._blocks[number], self.attention_module(number)
            norm, mlp = (getattr(block, name, None) for name in (self.family.second_norm, self.family.mlp))
            if norm is None or mlp is None:
                raise UnsupportedModelError(
                    f"{type(block).__name__}, block {number} of this vision tower, has no {self.family.second_norm} "
                    f"and {self.family.mlp} behind its attention, between which tokens could be merged"
                )
            self.family.check_norm(block)
            hook = BlockMerger(
                calls,
                number,
                block,
                attention,
                merges[number],
                self.num_prefix_tokens,
                merger,
                before=max((n for n in range(number) if merges[n]), default=None),
                run=run if number == last else None,
            )
            hook.install_around(edits, attention, norm, mlp)

    def mark_checkpoint(self, edits: Edits, settings: dict[str, Any]) -> None:
        """Note in the tower's config what is on it, so that a checkpoint saved meanwhile says how to load it."""
        if self._config is not None:
            mark_checkpoint(edits, self._config, settings, {"config": self.restore})

    def on_visual_tokens(self, edits: Edits, run: Run, selector: TokenSelector) -> None:
        raise unsupported(self._model)

    def on_decoder_layers(self, edits: Edits, run: Run, rule: TokenRule) -> None:
        raise unsupported(self._model)

    def projector_site(self) -> ProjectorSite:
        raise unsupported(self._model)

    def _record_calls(self, edits: Edits) -> TowerCalls:
        """What finds the call that tokens belong to, put on the tower when first needed."""
        if self._calls is None:
            calls = self._calls = TowerCalls(self.host, self.family.layout)
            edits.after(self._patches, calls.begin)
            edits.before(self._blocks[0], calls.enter)
            for block in self._blocks:
                norm = getattr(block, self.family.first_norm, None)
                if norm is not None:
                    edits.after(norm, calls.carry)
                edits.after(block, calls.carry)
            edits.after(self._blocks[-1], calls.finish)
        return self._calls

    def _bring_weights(self, edits: Edits, block: nn.Module, number: int) -> None:
        """Check that weights can be put into a block that see tokens on their grid, and guard checkpoints."""
        check_at_hand(block, f"block {number} of this vision tower, {type(block).__name__},", self._model)
        if not self._brings_weights:
            self.family.check_patches(self.host)
            self._guard_checkpoints(edits)
            self._brings_weights = True

    def _check_unwatched(self, attention: nn.Module, block: int) -> None:
        kind = _found(attention, {TowerReader: "pruning method", ScoreRecorder: "loss on its attention"})
        if kind is not None:
            raise ValueError(
                f"the attention of block {block} is being watched by a {kind}; replace the attention first: "
                f"vltok.apply(model, [attention method, {kind}])"
            )

    def _check_unmerged(self) -> None:
        if is_merging(self.host):
            raise ValueError(
                "tokens are merged in this vision tower, so those in later blocks form no grid, and their attention "
                "counts one for several; remove that handle first, this method and merging don't go together"
            )

    def _check_alone(self) -> None:
        """Check that nothing is on the tower that needs all its tokens."""
        self._check_unmerged()
        kind = _found(self.host, _NEED_ALL_TOKENS)
        if kind is not None:
            raise ValueError(
                f"{kind} is on this vision tower, which needs all its tokens, so these can't be merged; remove that "
                "handle first, the two don't go together"
            )

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
