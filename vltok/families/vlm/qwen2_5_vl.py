"""Qwen2.5-VL: pictures of any size, window attention in the tower, positions on three axes."""

from __future__ import annotations

import sys
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index

from vltok.edits import Edits
from vltok.engine.attention import received_attention
from vltok.engine.features import Encoding, ImageTokens, VisionRecorder, pixel_keys
from vltok.families.vlm.base import VlmFamily
from vltok.views import AttentionRequest


class Qwen2_5_VL(VlmFamily):
    """How Qwen2.5-VL is put together."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_classes = ("Qwen2_5_VLModel",)
    multi_axis_positions = True

    def tower(self, model: nn.Module) -> nn.Module:
        return model.visual

    def watch_vision(self, edits: Edits, model: nn.Module, recorder: VisionRecorder) -> None:
        watch = _Watch(recorder)
        edits.before(model.visual, watch.before_tower)
        edits.after(model.visual, watch.after_tower)

    def watch_attention(
        self, edits: Edits, model: nn.Module, recorder: VisionRecorder, request: AttentionRequest
    ) -> None:
        attention = self.attention_module(model, request)
        watch = _WatchReceived(recorder)
        edits.after(attention.qkv, watch.after_qkv)
        edits.after(attention, watch.after_attention)

    def images(self, model: nn.Module, encoding: Encoding, runs: list[int]) -> list[ImageTokens]:
        lengths = (encoding.extras["grid_thw"].prod(-1) // model.visual.spatial_merge_size**2).tolist()
        images, first = [], 0
        attention = self._token_attention(model, encoding)
        for index, length in enumerate(lengths):
            own = slice(first, first + length)
            scores = None if attention is None else attention[own]
            images.append(ImageTokens(length, encoding.keys[index], scores, None, first))
            first += length
        return images

    def _token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """Attention received by each visual token, (tokens,): the mean over its patches, out of the window order."""
        if encoding.attention is None:
            return None
        visual, grid = model.visual, encoding.extras["grid_thw"]
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


class _Watch:
    """Records images that come as one long sequence of patches."""

    def __init__(self, recorder: VisionRecorder) -> None:
        self.recorder = recorder

    def before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        images = pixels.split(grid.prod(-1).tolist())
        self.recorder.begin(pixels, torch.cat([pixel_keys(image.unsqueeze(0)) for image in images]), grid_thw=grid)

    def after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.recorder.encoding.features = output.pooler_output.detach()
        self.recorder.encoding.is_open = False


class _WatchReceived:
    """Records the attention every patch receives from all queries together, window by window."""

    def __init__(self, recorder: VisionRecorder) -> None:
        self.recorder = recorder
        self._qkv: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _WatchReceived:
        return _WatchReceived(deepcopy(self.recorder, memo))

    def after_qkv(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self._qkv = output.detach()

    @torch.no_grad()
    def after_attention(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.recorder.encoding is None or not self.recorder.encoding.is_open:
            return
        heads = module.num_heads
        query, key, _ = self._qkv.unflatten(-1, (3, heads, -1)).unbind(1)  # (patches, H, C / H)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *kwargs["position_embeddings"])
        bounds = (args[1] if len(args) > 1 else kwargs["cu_seqlens"]).tolist()
        # A mean over the queries of each window would rank patches in the small windows at the edges above all others.
        parts = [
            (b - a)
            * received_attention(query[a:b].flatten(1)[None], key[a:b].flatten(1)[None], heads, module.scaling)[0]
            for a, b in pairwise(bounds)
        ]
        self._qkv = None
        self.recorder.encoding.attention = torch.cat(parts)
