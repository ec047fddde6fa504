"""LLaVA-1.5 in vLLM, with pruned images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper, get_layer_index
from vllm.multimodal import MULTIMODAL_REGISTRY

from vltok.errors import UnsupportedModelError
from vltok.methods import Selector
from vltok.serving.options import Pruning, square
from vltok.serving.vllm.model import FILL, Item, PrunedModel
from vltok.serving.vllm.processing import PrunedInfo, PrunedProcessor
from vltok.serving.vllm.tower import TowerReader, layer_of
from vltok.tokens import Grid3

# Towers that transformers saves since version 5 have one level of names less.
NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


class PrunedClip(PrunedModel):
    """What models share whose tower is a CLIP or a SigLIP, of which only the layers up to the features are built."""

    @contextmanager
    def prepared(self, config: Any, pruning: Pruning | None) -> Iterator[None]:
        """Have all layers built where a selector looks at one behind the features."""
        self.level = None
        level, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
        if pruning is None:
            yield
            return
        has_cls = self._has_cls(config)
        request = pruning.selector.attention_request(has_cls)
        if not isinstance(level, int) and (request is not None or "features" in pruning.selector.needs):
            raise UnsupportedModelError(
                f"{pruning.selector.name} reads the vision tower, and this model takes its features from several "
                f"layers ({level}); choose a method that doesn't, such as divprune"
            )
        if request is None or layer_of(request, depth) < get_layer_index(level, depth):
            yield
            return
        self.level = get_layer_index(level, depth) - 1  # the layer that gives the features
        config.vision_feature_layer = -1
        try:
            yield
        finally:
            config.vision_feature_layer = level

    def tower_reader(self, selector: Selector) -> TowerReader:
        if self.level is not None:
            _features_from(self.vision_tower.vision_model.encoder, self.level)
        depth = self.config.vision_config.num_hidden_layers
        return TowerReader(selector, self.vision_tower, depth, self._has_cls(self.config), self.multi_modal_projector)

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)

    def patches(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """What was read of rows of the tower, (R, S, ...), without [CLS] where the features are without it."""
        has_more = self._has_cls(self.config) and self.config.vision_feature_select_strategy == "default"
        return values[:, 1:] if has_more and name != "features" else values

    @staticmethod
    def _has_cls(config: Any) -> bool:
        return config.vision_config.model_type == "clip_vision_model"


class LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """Prompts of LLaVA-1.5."""

    def grid_of(self, item: Any, kind: str, num_tokens: int) -> Grid3 | None:
        return square(num_tokens)


class LlavaInfo(PrunedInfo, LlavaProcessingInfo):
    """Sizes of LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlava(PrunedClip, LlavaForConditionalGeneration):
    """LLaVA-1.5 with a CLIP or SigLIP tower."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | NAMES

    def grid(self, item: Item) -> Grid3 | None:
        return square(len(item.tokens))

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        values = self.patches(name, values)[0]
        missing = len(item.tokens) - len(values)  # a [CLS] among the tokens
        return torch.cat([values.new_full((missing, *values.shape[1:]), FILL[name]), values]) if missing else values


def _features_from(encoder: nn.Module, layer: int) -> None:
    """Have a tower give the features of a layer that isn't its last."""
    found: list[torch.Tensor] = []
    encoder.layers[layer].register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    encoder.register_forward_hook(lambda module, args, output: found.pop())
