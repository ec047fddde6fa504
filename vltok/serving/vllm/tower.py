"""Reads the vision tower of a served model while it encodes: attention, keys and features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

from vltok.engine.attention import cls_attention, received_attention
from vltok.methods import Selector
from vltok.visual import AttentionRequest


def attention_layers(tower: nn.Module) -> list[MMEncoderAttention]:
    """The attention of each layer of a vision tower, in their order."""
    return [module for module in tower.modules() if isinstance(module, MMEncoderAttention)]


class TowerReader:
    """Notes what a selector asks for, each time that the tower runs.

    Args:
        selector: The selector.
        tower: The vision tower.
        num_layers: How many layers it has when it is whole; those behind the features may not have been built.
        has_cls: Whether it has a [CLS] token.
        projector: What its features go to, or None.
        is_sequence_first: Whether that takes (S, 1, C) instead of (R, N, C).

    Raises:
        ValueError: If the attention of a layer is asked for that the tower doesn't have.
    """

    def __init__(
        self,
        selector: Selector,
        tower: nn.Module,
        num_layers: int,
        has_cls: bool,
        projector: nn.Module | None,
        is_sequence_first: bool = False,
    ) -> None:
        self.is_sequence_first = is_sequence_first
        self.request = selector.attention_request(has_cls)
        self.has_keys = "keys" in selector.needs
        self.seen: dict[str, list[torch.Tensor]] = {}
        if self.request is not None:
            layers, layer = attention_layers(tower), layer_of(self.request, num_layers)
            if layer >= len(layers):
                raise ValueError(f"layer {self.request.layer} of the vision tower was not built; it has {len(layers)}")
            layers[layer].register_forward_pre_hook(self._see_attention, with_kwargs=True)
        if "features" in selector.needs and projector is not None:
            projector.register_forward_pre_hook(self._see_features, with_kwargs=True)

    @contextmanager
    def reading(self) -> Iterator[dict[str, list[torch.Tensor]]]:
        """What is read while the block runs, by name, of each time that the tower ran."""
        self.seen = {}
        try:
            yield self.seen
        finally:
            self.seen = {}

    @torch.no_grad()
    def _see_attention(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        query, key = (self._heads(module, given[name]) for name in ("query", "key"))
        bounds = given.get("cu_seqlens")
        lengths = [query.shape[2]] if bounds is None else bounds.diff().tolist()
        read = cls_attention if self.request.kind == "cls" else received_attention
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
        self._note("attention", torch.cat([read(*part, module.scale) for part in parts], dim=1))
        if self.has_keys:
            self._note("keys", key.transpose(1, 2))

    def _heads(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """(B, S, H * d) or (B, S, H, d) -> (B, H, S, d)."""
        states = states.unflatten(-1, (-1, module.head_size)) if states.dim() == 3 else states
        return states.transpose(1, 2)

    def _see_features(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        states = states.unsqueeze(0) if states.dim() == 2 else states
        self._note("features", states.transpose(0, 1) if self.is_sequence_first else states)

    def _note(self, name: str, values: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append(values)


def layer_of(request: AttentionRequest, num_layers: int) -> int:
    """Which layer of a whole tower is asked for, counted from 0."""
    return request.layer % num_layers
