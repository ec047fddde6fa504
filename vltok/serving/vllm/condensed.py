"""LLaVA-1.5 in vLLM with a trained condenser in the place of its projector: N / s^2 visual tokens of each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, PromptUpdate

from vltok.serving.condenser import PROJECTOR, SavedCondenser
from vltok.serving.options import REQUEST
from vltok.serving.vllm.llava import NAMES
from vltok.serving.vllm.projector import make_projector


class CondensedInfo(LlavaProcessingInfo):
    """Sizes of LLaVA-1.5 with a condenser."""

    @cached_property
    def condenser(self) -> SavedCondenser:
        """What the model's config names."""
        return SavedCondenser.of_config(self.get_hf_config())

    @cached_property
    def identity(self) -> str:
        """Read once: the weights may be large."""
        return self.condenser.identity()

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        whole = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return whole // self.condenser.fewer


class CondensedProcessor(LlavaMultiModalProcessor):
    """Prompts of LLaVA-1.5 with a condenser."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        if given := sorted({*REQUEST} & {*hf_processor_mm_kwargs}):
            raise ValueError(
                f"{', '.join(given)} is for pruning; a condenser makes the same number of tokens each time"
            )
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        return {kind: [f"{each}-{self.info.identity}" for each in values] for kind, values in hashes.items()}


@MULTIMODAL_REGISTRY.register_processor(CondensedProcessor, info=CondensedInfo, dummy_inputs=LlavaDummyInputsBuilder)
class CondensedLlava(LlavaForConditionalGeneration):
    """LLaVA-1.5 with a CLIP or SigLIP tower and a condenser."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | NAMES
    supports_tower_connector_lora: ClassVar[bool] = False  # vLLM takes the tower to have as many tokens as the prompt

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        projector, levels = make_projector(config)
        before = config.vision_feature_layer
        config.vision_feature_layer = [*levels]  # the tower is built up to the deepest
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.vision_feature_layer = before
        self.levels = levels
        if not self._has_no_images():
            device = next(self.multi_modal_projector.parameters()).device
            projector = projector.to(vllm_config.model_config.dtype).to_empty(device=device)
            self.multi_modal_projector = projector.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the model without its own projector, whose weights are those of the condenser."""
        loaded = super().load_weights((name, tensor) for name, tensor in weights if PROJECTOR not in name.split("."))
        if self._has_no_images():
            return loaded
        return loaded | SavedCondenser.of_config(self.config).load(self.multi_modal_projector)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        return vision_tower(
            pixel_values,
            select_layers=[*self.levels],
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )

    def _has_no_images(self) -> bool:
        """Whether the server was started without images, and vLLM built neither tower nor projector."""
        return isinstance(self.multi_modal_projector, StageMissingLayer)
