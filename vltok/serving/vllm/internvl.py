"""InternVL in vLLM, with pruned images: tiles and a thumbnail behind them, four patches merged into one token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar

import torch
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vltok.engine.features import pixel_keys
from vltok.engine.patches import fold
from vltok.errors import UnsupportedModelError
from vltok.methods import Selector
from vltok.serving.options import Pruning, square
from vltok.serving.vllm.model import Item, PrunedModel
from vltok.serving.vllm.processing import PrunedInfo, PrunedProcessor
from vltok.serving.vllm.tower import TowerReader
from vltok.tokens import Grid3

TILES = "image_num_patches"  # vLLM's word for the tiles of an image, with its thumbnail
PIXELS = "pixel_values"  # of the tiles of all images
SHARED = "image_token_id"
# What vLLM takes from the tower, whatever the config says.
TAKEN = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}


class InternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):
    """Prompts of InternVL."""

    def grid_of(self, item: Any, kind: str, num_tokens: int) -> Grid3 | None:
        return square(num_tokens) if self.tiles_of(item) == 1 and TILES in item else None

    def tiles_of(self, item: Any) -> int:
        return int(item[TILES].data) if TILES in item else 1


class InternVLInfo(PrunedInfo, InternS1ProcessingInfo):
    """Sizes of InternVL."""

    refused: ClassVar = {"video": "in a prompt the frames of a video stand apart, with words between them"}


@MULTIMODAL_REGISTRY.register_processor(InternVLProcessor, info=InternVLInfo, dummy_inputs=InternS1DummyInputsBuilder)
class PrunedInternVL(PrunedModel, InternS1ForConditionalGeneration):
    """InternVL as transformers has it."""

    @contextmanager
    def prepared(self, config: Any, pruning: Pruning | None) -> Iterator[None]:
        """Refuse models that take something else from the tower than vLLM does."""
        other = {name: getattr(config, name) for name, own in TAKEN.items() if getattr(config, name) != own}
        if pruning is not None and other:
            raise UnsupportedModelError(
                f"this model has {other}, and vLLM takes {TAKEN} from the tower, whatever the config says; run it on "
                "transformers"
            )
        yield

    def tower_reader(self, selector: Selector) -> TowerReader:
        depth = self.config.vision_config.num_hidden_layers
        return TowerReader(selector, self.vision_tower, depth, True, self.multi_modal_projector)

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)

    def part(self, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        tiles = arguments.get(TILES)
        bounds = {} if tiles is None else {PIXELS: list(accumulate(tiles.tolist(), initial=0))}
        each = range(max(last, first) + 1)
        return {
            name: value if name == SHARED else value[bounds.get(name, each)[first] : bounds.get(name, each)[last]]
            for name, value in arguments.items()
        }

    def tiles(self, item: Item) -> int:
        return int(item.arguments[TILES][0]) if TILES in item.arguments else 1

    def key(self, item: Item, begin: int, length: int) -> torch.Tensor:
        if PIXELS not in item.arguments:
            return super().key(item, begin, length)
        own = len(item.tokens) // self.tiles(item)  # tokens of a tile
        return pixel_keys(item.arguments[PIXELS])[begin // own : (begin + length) // own].sum(0, keepdim=True)

    def grid(self, item: Item) -> Grid3 | None:
        return square(len(item.tokens)) if TILES in item.arguments and self.tiles(item) == 1 else None

    def tower_rows(self, arguments: dict[str, Any], number: int) -> int:
        return int(arguments[TILES][number])

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        if name == "features":  # of four patches each
            return values.flatten(0, 1)
        values = values[:, 1:]  # without [CLS]
        rows, length = values.shape[:2]
        side = math.isqrt(length)
        merge = math.isqrt(rows * length // len(item.tokens))
        return fold(values.flatten(0, 1), (rows, side, side), merge, "rows").flatten(0, 1)

    def overview(self, item: Item) -> torch.Tensor:
        length, tiles = len(item.tokens), self.tiles(item)
        return torch.arange(length, device=item.tokens.device) >= length - length // tiles  # the thumbnail comes last
