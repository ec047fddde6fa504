"""Qwen's vision-language models in vLLM, with pruned images and videos."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vltok.engine.patches import fold
from vltok.methods import Selector
from vltok.serving.positions import Media
from vltok.serving.vllm.model import Item, PrunedModel
from vltok.serving.vllm.processing import PrunedInfo, PrunedProcessor
from vltok.serving.vllm.tower import TowerReader
from vltok.tokens import Grid3

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
ROWS = ("pixel_values", "pixel_values_videos")  # one for each patch
EMBEDDED = ("image_embeds", "video_embeds")  # one for each token


def merged(grid: Any, merge: int) -> Grid3:
    """Frames, rows and columns of tokens, of those of patches."""
    frames, rows, columns = (int(side) for side in grid)
    return frames, rows // merge, columns // merge


def positions_of_frame(config: Any, seconds: torch.Tensor | None) -> float:
    """How many positions lie between two frames that are so many seconds apart; 1 where positions don't tell time."""
    return getattr(config.vision_config, "tokens_per_second", 1.0) * (1.0 if seconds is None else float(seconds))


class QwenProcessor(PrunedProcessor):
    """Stands before a processor whose images and videos come with their grids."""

    def grid_of(self, item: Any, kind: str, num_tokens: int) -> Grid3:
        return merged(item[GRIDS[kind]].data, self.info.get_hf_config().vision_config.spatial_merge_size)

    def span_of(self, item: Any, kind: str, num_tokens: int) -> int:
        frames, rows, columns = self.grid_of(item, kind, num_tokens)
        seconds = item.get("second_per_grid_ts")
        factor = positions_of_frame(self.info.get_hf_config(), None if seconds is None else seconds.data)
        return max(int((frames - 1) * factor) + 1, rows, columns)


class PrunedQwen(PrunedModel):
    """What Qwen's models share: patches of all images in one row, and positions on three axes."""

    has_axes = True

    @property
    def merge(self) -> int:
        """Patches along the side of what a token stands for."""
        return self.config.vision_config.spatial_merge_size

    def tower_reader(self, selector: Selector) -> TowerReader:
        depth = self.config.vision_config.depth
        return TowerReader(selector, self.visual, depth, False, self.before_merger(), is_sequence_first=True)

    def get_encoder_cudagraph_config(self) -> Any:
        """Leave the tower without CUDA graphs, which vLLM would run in place of `embed_multimodal`."""
        config = super().get_encoder_cudagraph_config()
        return config if self.pruning is None else replace(config, modalities=[])

    def before_merger(self) -> nn.Module:
        """What gets the features of single patches: the norm in the merger, which itself may be compiled."""
        return self.visual.merger.ln_q

    def part(self, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        grids = arguments[next(name for name in GRIDS.values() if name in arguments)]
        patches = list(accumulate(grids.prod(-1).tolist(), initial=0))
        cut = {}
        for name, value in arguments.items():
            each = {**dict.fromkeys(ROWS, 1), **dict.fromkeys(EMBEDDED, self.merge**2)}.get(name)
            bounds = (first, last) if each is None else (patches[first] // each, patches[last] // each)
            cut[name] = value[slice(*bounds)]
        return cut

    def grid(self, item: Item) -> Grid3:
        return merged(item.arguments[GRIDS[item.kind]][0], self.merge)

    def tower_rows(self, arguments: dict[str, Any], number: int) -> int:
        grids = arguments[next(name for name in GRIDS.values() if name in arguments)]
        return int(grids[number].prod())

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        frames, rows, columns = map(int, item.arguments[GRIDS[item.kind]][0])
        return fold(values, (frames, rows, columns), self.merge, "blocks").flatten(0, 1)

    def offsets(self, item: Item) -> tuple[torch.Tensor, int]:
        seconds = item.arguments.get("second_per_grid_ts")
        return self._offsets(self.grid(item), None if seconds is None else seconds[0])

    def media(self, feature: MultiModalFeatureSpec) -> Media:
        place, data = feature.mm_position, feature.data
        seconds = data.get("second_per_grid_ts")
        grid = merged(data[GRIDS[feature.modality]].data, self.merge)
        _, span = self._offsets(grid, None if seconds is None else seconds.data)
        return Media(place.offset, place.offset + place.length, span)

    def _offsets(self, grid: Grid3, seconds: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        """Positions of the tokens of a grid whose frames are so far apart."""
        offsets = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3).T
        factor = positions_of_frame(self.config, seconds)
        if factor != 1.0:
            offsets = torch.stack([(offsets[0] * factor).long(), *offsets[1:]])
        return offsets, int(offsets.max()) + 1


class Qwen2_5Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """Prompts of Qwen2.5-VL."""


class Qwen2_5Info(PrunedInfo, Qwen2_5_VLProcessingInfo):  # noqa: N801
    """Sizes of Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(Qwen2_5Processor, info=Qwen2_5Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class PrunedQwen2_5_VL(PrunedQwen, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL, whose tower has its patches window by window."""

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        order, _ = get_vision_window_index(
            torch.as_tensor(item.arguments[GRIDS[item.kind]][:1]).cpu(),
            spatial_merge_size=self.merge,
            window_size=self.visual.window_size,
            patch_size=self.visual.patch_size,
        )
        blocks = values.unflatten(0, (-1, self.merge**2))
        return super().of_tokens(item, name, blocks[order.argsort().to(values.device)].flatten(0, 1))


class Qwen2Processor(QwenProcessor, Qwen2VLMultiModalProcessor):
    """Prompts of Qwen2-VL."""


class Qwen2Info(PrunedInfo, Qwen2VLProcessingInfo):
    """Sizes of Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(Qwen2Processor, info=Qwen2Info, dummy_inputs=Qwen2VLDummyInputsBuilder)
class PrunedQwen2VL(PrunedQwen, Qwen2VLForConditionalGeneration):
    """Qwen2-VL, whose tower has all patches of a frame in one window."""
