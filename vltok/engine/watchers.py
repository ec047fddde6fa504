"""What watches the attention of a tower, which itself runs as it always does, and shows a method what it sees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.parts import attention_scale, num_heads, score_layers, split_arguments
from vltok.engine.tower_call import TowerCall, TowerCalls, TowerHook, tokens_in
from vltok.engine.tower_layout import SideBySide
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.views import ScoreWatcher


class CallWatch(TowerHook):
    """Tells a watcher when pictures enter a tower, and when they have passed or were broken off."""

    def __init__(self, calls: TowerCalls, watcher: ScoreWatcher) -> None:
        super().__init__(calls.owner)
        self.calls = calls
        self.watcher = watcher

    def start(self, patches: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        self.watcher.start(self.calls.newest())

    def leave(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if output is None:  # it raised
            self.watcher.drop(self.calls.call_of(tokens_in(args, kwargs)))

    def finish(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.watcher.finish(self.calls.call_of(tokens_in(args, kwargs)))


class MapRecorder(TowerHook):
    """Shows the probabilities that go through a dropout layer, before it drops any."""

    def __init__(self, calls: TowerCalls, number: int, watcher: ScoreWatcher) -> None:
        super().__init__(calls.owner)
        self.calls = calls
        self.number = number
        self.watcher = watcher

    def show(self, dropout: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if dropout.training:
            self.watcher.see_map(self.calls.newest(), self.number, args[0])


Turn = Callable[[nn.Module, torch.Tensor, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


class _Scores:
    """Queries and keys of an attention that runs, and those of the one that it runs inside."""

    __slots__ = ("is_wanted", "key", "outer", "query")

    def __init__(self, is_wanted: bool, outer: _Scores | None) -> None:
        self.is_wanted = is_wanted
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self.outer = outer


class AttentionListener(TowerHook):
    """Holds the queries and keys of one block from where they are made until the block has attended.

    Adapters come and go between the attention and the layers that make them. So the layers are looked up when the
    attention runs, and those that aren't listened to yet are from then on.

    Args:
        calls: Finds the calls of the tower.
        number: The block's number.
        block: The block.
        heads: Heads of its attention.
    """

    def __init__(self, calls: TowerCalls, number: int, block: nn.Module, heads: int) -> None:
        super().__init__(block)
        self.calls = calls
        self.number = number
        self.heads = heads
        self._start_empty()

    def _start_empty(self) -> None:
        self._thread = threading.local()  # scores: those of the attention that runs in this thread

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_empty()

    def is_wanted(self, attention: nn.Module) -> bool:
        """Whether queries and keys are to be held now."""
        return True

    def show(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the attention, also if it raised."""
        raise NotImplementedError(f"{type(self).__name__} must define show()")

    def install(self, edits: Edits, attention: nn.Module) -> None:
        """Put the hooks on."""
        edits.at_undo(self.leave_layers)
        self.join_layers(attention)
        edits.before(attention, self.open)
        edits.after(attention, self.show, always=True)

    def join_layers(self, attention: nn.Module) -> None:
        """Listen to the layers that give queries and keys now."""
        layers = score_layers(attention)
        if layers is None:
            raise UnsupportedModelError(
                f"{type(attention).__name__}, block {self.number} of this vision tower, has no layers for queries and "
                "keys any more; remove the handle first, or leave the block out with blocks=(start, stop)"
            )
        for layer, keep in zip(layers, (self.keep_query, self.keep_key), strict=True):
            if keep not in layer._forward_hooks.values():
                layer.register_forward_hook(keep)

    def leave_layers(self) -> None:
        """Stop listening, also to layers that came later."""
        for module in self.owner.modules():
            for key, hook in list(module._forward_hooks.items()):
                if hook in (self.keep_query, self.keep_key):
                    del module._forward_hooks[key]

    def open(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the attention."""
        if self.is_wanted(attention) and not torch.compiler.is_compiling():
            self.join_layers(attention)
        outer = getattr(self._thread, "scores", None)
        if outer is not None:
            outer.outer = None  # one inside another is as deep as it goes; more were broken off
        self._thread.scores = _Scores(self.is_wanted(attention), outer)

    def keep_query(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """After the layer that makes queries."""
        scores = getattr(self._thread, "scores", None)
        if scores is not None and scores.is_wanted:
            scores.query = output

    def keep_key(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """After the layer that makes keys."""
        scores = getattr(self._thread, "scores", None)
        if scores is not None and scores.is_wanted:
            scores.key = output

    def close(self) -> _Scores:
        """End listening to the attention that ran, and say what was heard."""
        scores = self._thread.scores
        self._thread.scores = scores.outer
        return scores

    def check_heard(self, attention: nn.Module, scores: _Scores) -> None:
        """Raise UnsupportedInputError if no queries or keys were heard of an attention that ran."""
        if scores.query is None or scores.key is None:
            raise UnsupportedInputError(
                f"the layers for queries and keys of {type(attention).__name__}, block {self.number} of this vision "
                "tower, were replaced before it was compiled; run the tower once without torch.compile first"
            )

    def _by_heads(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C), (B * N, heads, d) or (B, heads, N, d) -> (B, heads, N, d), where tokens are (B, N, C)."""
        return x if x.dim() == 4 else x.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class ScoreRecorder(AttentionListener):
    """Shows a watcher the queries and keys of one block, in train mode.

    Args:
        calls: Finds the calls of the tower.
        number: The block's number.
        block: The block.
        attention: Its attention.
        watcher: Who is shown what.
        turn: Makes of queries and keys, (B, heads, N, d), what the products are of, given the attention and its keyword
            arguments.
        is_masked: Whether masks say no more than which tokens are of one picture.

    Raises:
        UnsupportedModelError: If the attention doesn't say where its queries and keys are.
    """

    def __init__(
        self,
        calls: TowerCalls,
        number: int,
        block: nn.Module,
        attention: nn.Module,
        watcher: ScoreWatcher,
        turn: Turn,
        is_masked: bool,
    ) -> None:
        scale, heads = attention_scale(attention), num_heads(attention)
        if score_layers(attention) is None or scale is None or not heads:
            raise UnsupportedModelError(
                f"{type(attention).__name__}, block {number} of this vision tower, exposes no attention probabilities: "
                "it has no softmax over scaled products of queries and keys that vltok can find, as CLIP, SigLIP, ViT "
                "and DINOv2 of transformers and most ViTs of timm have; leave such blocks out with blocks=(start, stop)"
            )
        super().__init__(calls, number, block, heads)
        self.scale = scale
        self.watcher = watcher
        self.turn = turn
        self.is_masked = is_masked

    def is_wanted(self, attention: nn.Module) -> bool:
        return attention.training

    def show(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        scores = self.close()
        if output is None or not scores.is_wanted:
            return
        self.check_heard(attention, scores)
        if not self.is_masked and (others := split_arguments(args, kwargs)[1]):
            raise UnsupportedInputError(
                f"{type(attention).__name__} got {', '.join(others)}, with which its probabilities are not those of "
                "its queries and keys; call the vision tower without"
            )
        tokens = tokens_in(args, kwargs)
        query, key = (self._by_heads(x, tokens) for x in (scores.query, scores.key))
        query, key = self.turn(attention, query, key, kwargs)
        call = self.calls.call_of(tokens)
        self.watcher.see(call, self.number, self._by_picture(call, query, key), self.scale)

    def _by_picture(
        self, call: TowerCall | None, query: torch.Tensor, key: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries and keys of pictures of one grid each, (P, heads, H * W, d)."""
        if call is None and self.is_masked:
            raise UnsupportedInputError(
                f"tokens came into block {self.number} of this vision tower, and nothing tells which images they are "
                "of; call the whole tower, with images"
            )
        if call is None or not isinstance(call.layout, SideBySide):
            return [(query, key)]
        return [
            tuple(group.of(x.transpose(1, 2)).transpose(1, 2) for x in (query, key)) for group in call.layout.groups
        ]
