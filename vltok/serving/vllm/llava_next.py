"""LLaVA-NeXT in vLLM, with pruned images: a thumbnail and crops, laid out as one map with a newline in every row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vltok.serving.vllm.llava import NAMES, PrunedClip
from vltok.serving.vllm.model import FILL, Item
from vltok.serving.vllm.processing import PrunedInfo, PrunedProcessor

CROPS = "pixel_values"  # (crops, 3, H, W) for each image; other images of a batch may have more


class PrunedCrops(PrunedClip):
    """What models share that see an image as several crops."""

    def tower_rows(self, arguments: dict[str, Any], number: int) -> int:
        return len(next(value for name, value in arguments.items() if name.startswith(CROPS))[number])

    def pixels(self, item: Item) -> torch.Tensor:
        given = [value for name, value in item.arguments.items() if name.startswith(CROPS)]
        return given[0][0] if given else item.tokens

    @property
    def patches_of_crop(self) -> int:
        """Visual tokens of a crop, before anything is cut off or shrunk."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2


class LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """Prompts of LLaVA-NeXT."""


class LlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):
    """Sizes of LLaVA-NeXT."""


@MULTIMODAL_REGISTRY.register_processor(LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlavaNext(PrunedCrops, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with a CLIP or SigLIP tower."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | NAMES

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        values = self.patches(name, values).flatten(0, 1)
        flat = torch.cat([values, values.new_full((1, *values.shape[1:]), FILL[name])])  # number -1: a newline
        return flat[self._numbers(item).to(flat.device)]

    def overview(self, item: Item) -> torch.Tensor:
        if CROPS not in item.arguments:  # embeddings, and nobody knows how they were laid out
            return super().overview(item)
        numbers = self._numbers(item).to(item.tokens.device)
        return (numbers >= 0) & (numbers < self.patches_of_crop)

    def _numbers(self, item: Item) -> torch.Tensor:
        """Which row of its crops each token of an image is, (N,), int64, -1 for newlines.

        vLLM itself says where each row goes: it packs their numbers in the place of the features.
        """
        rows = len(item.arguments[CROPS][0]) * self.patches_of_crop
        packed = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            SimpleNamespace(config=self.config, image_newline=torch.full((1,), -1.0, dtype=torch.float64)),
            item.arguments["image_sizes"][0],
            torch.arange(rows, dtype=torch.float64).view(-1, self.patches_of_crop, 1),
            strategy="spatial_unpad",
        )
        return packed.flatten().long()
