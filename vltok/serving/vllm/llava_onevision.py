"""LLaVA-OneVision in vLLM, with pruned images and videos: crops, shrunk where they are many, and pooled frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vltok.errors import UnsupportedModelError
from vltok.serving.options import Pruning
from vltok.serving.vllm.llava import NAMES
from vltok.serving.vllm.llava_next import PrunedCrops
from vltok.serving.vllm.model import FILL, Item
from vltok.serving.vllm.processing import PrunedInfo, PrunedProcessor
from vltok.tokens import Grid3

FRAMES = "pixel_values_videos"  # (frames, 3, H, W) for each video
SHRINKS = "anyres_max_9"  # more crops than so many are shrunk; the only kind that vLLM has


def grid_of_video(num_tokens: int, frames: int) -> Grid3:
    """Frames, rows and columns of the tokens of a video, without the newline at its end."""
    side = round(((num_tokens - 1) // frames) ** 0.5)
    return frames, side, side


class LlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    """Prompts of LLaVA-OneVision."""

    def grid_of(self, item: Any, kind: str, num_tokens: int) -> Grid3 | None:
        return grid_of_video(num_tokens, len(item[FRAMES].data)) if kind == "video" else None


class LlavaOnevisionInfo(PrunedInfo, LlavaOnevisionProcessingInfo):
    """Sizes of LLaVA-OneVision."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor, info=LlavaOnevisionInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class PrunedLlavaOnevision(PrunedCrops, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with a SigLIP or CLIP tower."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | NAMES

    @contextmanager
    def prepared(self, config: Any, pruning: Pruning | None) -> Iterator[None]:
        """Refuse models that shrink their crops in another way than vLLM does."""
        if pruning is not None and config.vision_aspect_ratio != SHRINKS:
            raise UnsupportedModelError(
                f"vision_aspect_ratio={config.vision_aspect_ratio!r}, and vLLM lays images out as {SHRINKS!r} has it, "
                "whatever the config says; serve a model that was trained so, or run this one on transformers"
            )
        with super().prepared(config, pruning):
            yield

    def _process_video_pixels(self, inputs: Any) -> list[torch.Tensor]:
        # Where videos differ in length, vLLM 0.32 gives (1, N, D) of each, and then refuses its own result.
        return [tokens.flatten(0, -2) for tokens in super()._process_video_pixels(inputs)]

    def projected(self, features: torch.Tensor) -> None:
        """None: what the projector gives is pooled, or shrunk."""

    def grid(self, item: Item) -> Grid3 | None:
        return grid_of_video(len(item.tokens), len(item.arguments[FRAMES][0])) if item.kind == "video" else None

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        """What was read in the tower, packed, shrunk and pooled as the tokens are."""
        values = self.patches(name, values)
        rest, values = values.shape[2:], values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        newline = values.new_full((values.shape[-1],), FILL[name])
        if item.kind == "video":
            tokens = torch.cat([self.apply_pooling(values).flatten(0, 1), newline.unsqueeze(0)])
        else:
            tokens = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings(
                SimpleNamespace(config=self.config, image_newline=newline),
                item.arguments["image_sizes"][0],
                values,
                image_newline=newline,
                strategy="spatial_unpad",
            )
        return tokens.reshape(-1, *rest)
