"""Showing queries and keys of a self-attention to a method, while the attention itself runs as it always does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.families.self_attention import attention_scale, num_heads, score_layers, split_arguments
from vltok.views import ScoreWatcher


def watch(edits: Edits, block: int, attention: nn.Module, watcher: ScoreWatcher) -> None:
    """Show the watcher the queries and keys of an attention, each time it runs in train mode.

    Raises:
        UnsupportedModelError: If the attention doesn't say where its queries and keys are.
    """
    layers, scale, heads = score_layers(attention), attention_scale(attention), num_heads(attention)
    if layers is None or scale is None or not heads:
        raise UnsupportedModelError(
            f"{type(attention).__name__}, block {block} of this vision tower, exposes no attention probabilities: it "
            "has no softmax over scaled products of queries and keys that vltok can find, as CLIP, SigLIP, ViT and "
            "DINOv2 of transformers and most ViTs of timm have; leave such blocks out with blocks=(start, stop)"
        )
    recorder = ScoreRecorder(block, heads, scale, watcher)
    for layer, keep in zip(layers, (recorder.keep_query, recorder.keep_key), strict=True):
        edits.after(layer, keep)
    edits.after(attention, recorder.show)


class MapRecorder:
    """Shows the probabilities that go through a dropout layer, before it drops any."""

    def __init__(self, block: int, watcher: ScoreWatcher) -> None:
        self.block = block
        self.watcher = watcher

    def show(self, dropout: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if dropout.training:
            self.watcher.see_map(self.block, args[0])


class ScoreRecorder:
    """Holds the queries and keys of one block from where they are made until the block has attended."""

    def __init__(self, block: int, heads: int, scale: float, watcher: ScoreWatcher) -> None:
        self.block = block
        self.heads = heads
        self.scale = scale
        self.watcher = watcher
        self._query: torch.Tensor | None = None
        self._key: torch.Tensor | None = None

    def keep_query(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if layer.training:
            self._query = self._by_heads(output)

    def keep_key(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if layer.training:
            self._key = self._by_heads(output)

    def show(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._query is None or self._key is None:
            return
        query, key, self._query, self._key = self._query, self._key, None, None
        if others := split_arguments(args, kwargs)[1]:
            raise UnsupportedInputError(
                f"{type(attention).__name__} got {', '.join(others)}, with which its probabilities are not those of "
                "its queries and keys; call the vision tower without"
            )
        self.watcher.see(self.block, query, key, self.scale)

    def _by_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) or (B, heads, N, d) -> (B, heads, N, d)."""
        return x if x.dim() == 4 else x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
