"""Qwen2.5-VL: pictures of any size, window attention in the tower, positions on three axes."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index

from vltok.engine.attention import received_attention
from vltok.engine.features import Encoding
from vltok.engine.parts import live
from vltok.families.vlm.base import VlmFamily
from vltok.views import AttentionKind


class Qwen2_5_VL(VlmFamily):
    """How Qwen2.5-VL is put together."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_classes = ("Qwen2_5_VLModel",)
    attention_parts = ("qkv",)
    videos = "yes"
    axes = True
    windows = True

    def tower(self, model: nn.Module) -> nn.Module:
        return live(model.visual)

    def read_attention(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], kind: AttentionKind
    ) -> torch.Tensor:
        """The attention every patch receives from all queries together, window by window, (patches,)."""
        given = dict(zip(inspect.signature(attention.forward).parameters, args, strict=False)) | kwargs
        query, key, _ = attention.qkv(given["hidden_states"]).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *given["position_embeddings"])  # (patches, H, C / H)
        # A mean over the queries of each window would rank patches in the small windows at the edges above all others.
        with torch.autocast(key.device.type, enabled=False):
            parts = [
                (b - a)
                * received_attention(
                    query[a:b].flatten(1)[None], key[a:b].flatten(1)[None], attention.num_heads, attention.scaling
                )[0]
                for a, b in pairwise(given["cu_seqlens"].tolist())
            ]
        return torch.cat(parts)

    def token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """Attention received by each visual token, (V,): the mean over its patches, out of the window order."""
        if encoding.attention is None:
            return None
        visual, grid = self.tower(model), torch.tensor(encoding.grids)
        order, _ = get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        merged = encoding.attention.view(-1, visual.spatial_merge_size**2).mean(1)
        tokens = merged[torch.argsort(order.to(merged.device))]
        patches = grid.prod(-1)  # of each image: the queries that the mean is taken over
        queries = patches.repeat_interleave(patches // visual.spatial_merge_size**2)
        return tokens / queries.to(tokens.device)
