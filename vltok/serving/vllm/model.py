"""Prunes the visual tokens of a served model where they are encoded, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vltok.engine.features import pixel_keys
from vltok.engine.picking import coordinates_of
from vltok.errors import UnsupportedInputError
from vltok.methods import Selector
from vltok.serving.options import Pruning, budget_parts, of_numbers
from vltok.serving.positions import Media, fill_in, prompt_positions, split_offsets, with_offsets
from vltok.serving.vllm.processing import BUDGET
from vltok.serving.vllm.tower import TowerReader
from vltok.tokens import Grid3, gather_tokens
from vltok.visual import Selection, VisualTokens

FILL = {"attention": -math.inf, "keys": 0.0, "features": math.nan}  # what tokens get that stand for no patch


@dataclass(frozen=True)
class Item:
    """An image or video that was encoded.

    Attributes:
        kind: "image" or "video".
        arguments: What it was encoded with, as its encoder takes it.
        tokens: Its visual tokens as they enter the decoder, (N, D).
        more: What is added to them in later layers of the decoder, (N, M); M is 0 for most models.
        selector: What picks some of them, with the budget of the request.
        read: What was read in the tower, for each of its patches, by name, see `PrunedModel.tower_rows`.
    """

    kind: str
    arguments: dict[str, Any]
    tokens: torch.Tensor
    more: torch.Tensor
    selector: Selector
    read: dict[str, torch.Tensor]


class PrunedModel:
    """Stands before a model class of vLLM. A subclass says what only its model knows.

    Where the field `vltok_pruning` is missing in the config, the model is as without this class.
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supports_mrope: ClassVar[bool] = True
    has_axes: ClassVar[bool] = False  # whether visual tokens have positions on several axes

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        pruning = Pruning.of_config(config)
        carries_positions = pruning is not None and pruning.selector.positions == "keep"
        if carries_positions:
            _let_positions_through(vllm_config)
        with self.prepared(config, pruning):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning = pruning
        if pruning is None:
            return
        self.carries_positions = carries_positions
        self.is_multimodal_pruning_enabled = False  # vLLM's own pruning of videos
        self.at_once = max(1, vllm_config.scheduler_config.max_num_encoder_input_tokens)
        self.reader = self.tower_reader(pruning.selector)

    # What a model says of itself

    @contextmanager
    def prepared(self, config: Any, pruning: Pruning | None) -> Iterator[None]:
        """Whatever has to be otherwise while the model is built."""
        yield

    def tower_reader(self, selector: Selector) -> TowerReader:
        """What reads the vision tower."""
        raise NotImplementedError

    def part(self, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """The arguments of the encoder for some images of those it was called with."""
        return {name: value[first:last] for name, value in arguments.items()}

    def key(self, item: Item, begin: int, length: int) -> torch.Tensor:
        """The number that seeds random choices among some tokens of an image, (1,), int64."""
        return pixel_keys(self.pixels(item).unsqueeze(0)) + begin

    def pixels(self, item: Item) -> torch.Tensor:
        """What that number is made from: the image's pixels, or its embeddings."""
        given = [value for name, value in item.arguments.items() if name.startswith("pixel_values")]
        return torch.as_tensor(given[0]) if given else item.tokens

    def grid(self, item: Item) -> Grid3 | None:
        """Frames, rows and columns that the tokens form, or None."""
        return None

    def tiles(self, item: Item) -> int:
        """Tiles of an image that are told apart; they may have budgets of their own."""
        return 1

    def tower_rows(self, arguments: dict[str, Any], number: int) -> int:
        """How many rows of the tower an image has; or patches, where all images are in one row."""
        return 1

    def of_tokens(self, item: Item, name: str, values: torch.Tensor) -> torch.Tensor:
        """What was read of the patches of an image, (rows or patches, ...), for each of its tokens, (N, ...)."""
        raise NotImplementedError

    def overview(self, item: Item) -> torch.Tensor:
        """Which tokens show the whole image, (N,), bool."""
        return torch.ones(len(item.tokens), dtype=torch.bool, device=item.tokens.device)

    def projected(self, features: torch.Tensor) -> torch.Tensor | None:
        """Features through the projector; None where it takes more than one for a token."""
        return None

    def split(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What an image was encoded to: its tokens, (N, D), and what is added to them in later layers, (N, M)."""
        return encoded, encoded[:, :0]

    def offsets(self, item: Item) -> tuple[torch.Tensor, int]:
        """Positions of the tokens, from the start of the image, (3, N); and how many positions it takes."""
        length = len(item.tokens)
        return torch.arange(length).expand(3, length), length

    def placed(self, item: Item, indices: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What fills the places of an image, (P, D + M), with its positions as in `offsets`, (3, P).

        Args:
            item: The image.
            indices: Which tokens are kept, (K,), ascending, on the CPU.
            kept: What stands there, (K, D + M).
        """
        offsets, span = self.offsets(item)
        return kept, offsets[:, indices], span

    def media(self, feature: MultiModalFeatureSpec) -> Media:
        """Where an image stands in a prompt, and how many positions it takes."""
        place, (length, *_) = feature.mm_position, feature.data[BUDGET].data.tolist()
        begin, end = 0, place.length
        if place.is_embed is not None:  # words belong to it, around its tokens
            begin, end = place.is_embed.nonzero().flatten()[[0, -1]].tolist()
            end += 1
        return Media(place.offset + begin, place.offset + end, int(length))

    # What vLLM asks for

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos, as many at once as an unpruned model would, and keep some of their tokens."""
        if self.pruning is None or BUDGET not in kwargs:
            return super().embed_multimodal(**kwargs)
        budgets = kwargs.pop(BUDGET).tolist()
        kind = "video" if any("video" in name for name in kwargs) else "image"
        kept: list[torch.Tensor] = []
        for first, last in self._batches([int(length) for length, *_ in budgets]):
            arguments = self.part(kwargs, first, last)
            with self.reader.reading() as read:
                encoded = list(super().embed_multimodal(**arguments))
                rows = self._by_image(arguments, read, last - first)
            for number, (tokens, budget) in enumerate(zip(encoded, budgets[first:last], strict=True)):
                own = {name: values[number] for name, values in rows.items()}
                selector = of_numbers(self.pruning.selector, budget[1:])
                item = Item(kind, self.part(arguments, number, number + 1), *self.split(tokens), selector, own)
                kept.append(self._pruned(item, int(budget[0])))
        return kept

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt before its images are there."""
        if self.pruning is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        media = [self.media(feature) for feature in ordered]
        return prompt_positions(len(input_tokens), media, stretch=self.pruning.selector.positions == "stretch")

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Give the images that enter now their positions, and take these out of their embeddings."""
        if self.pruning is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        parts = [split_offsets(each) for each in multimodal_embeddings]
        numbers = torch.cat([own for _, own in parts], 1) if parts else mrope_positions.new_zeros(4, 0)
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        marks = torch.as_tensor(self.marks(), device=ids.device)
        slots = torch.isin(ids[num_computed_tokens:], marks).nonzero().squeeze(1)[: numbers.shape[1]]
        positions, delta = fill_in(mrope_positions, slots + num_computed_tokens, numbers.to(mrope_positions.device))
        return [own for own, _ in parts], positions, delta

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder. Where all axes agree, it gets one of them, as it does without pruning."""
        if positions.dim() == 2 and not self.has_axes:
            positions = positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)

    def marks(self) -> list[int]:
        """The ids of placeholders."""
        names = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")
        return sorted({mark for name in names if (mark := getattr(self.config, name, None)) is not None})

    # How it is done

    def _batches(self, lengths: list[int]) -> Iterator[tuple[int, int]]:
        """First and last of the images that are encoded together: the scheduler counts what is left of them."""
        first, total = 0, 0
        for number, length in enumerate(lengths):
            if number > first and total + length > self.at_once:
                yield first, number
                first, total = number, 0
            total += length
        if lengths:
            yield first, len(lengths)

    def _by_image(
        self, arguments: dict[str, Any], read: dict[str, list[torch.Tensor]], count: int
    ) -> dict[str, list[torch.Tensor]]:
        """What was read in the tower, by name and image."""
        rows = [self.tower_rows(arguments, number) for number in range(count)] if read else []
        parts = {}
        for name, runs in read.items():
            values = torch.cat(runs)
            values = values[0] if len(values) == 1 and sum(rows) != 1 else values  # patches of all images in one row
            parts[name] = list(values.split(rows))
        return parts

    @torch.no_grad()
    def _pruned(self, item: Item, expected: int) -> torch.Tensor:
        """The tokens that stay, (K, D + M), with their positions behind them where these are not their places."""
        tokens, selector = item.tokens, item.selector
        if len(tokens) != expected:
            raise UnsupportedInputError(
                f"the prompt was written for {expected} visual tokens of an {item.kind}, and its encoder gave "
                f"{len(tokens)}"
            )
        if not tokens.isfinite().all():
            raise UnsupportedInputError("the visual tokens contain NaN or infinity; check the image and the dtype")
        grid = self.grid(item)
        bounds = budget_parts(selector, len(tokens), grid, item.kind, self.tiles(item))
        parts = [self._part(item, own, begin, end) for begin, end, own in bounds]
        indices = torch.cat([where for where, _ in parts])
        kept = torch.cat([torch.cat([own for _, own in parts]), item.more[indices]], dim=1)
        if not self.carries_positions:
            return kept
        rows, offsets, span = self.placed(item, indices.cpu(), kept)
        return with_offsets(rows, offsets.to(rows.device), span)

    def _part(self, item: Item, grid: Grid3 | None, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and content of what stays of some tokens that share a budget."""
        selector, tokens = item.selector, item.tokens[begin:end].unsqueeze(0)
        num_keep = selector.budget(end - begin, grid, item.kind)
        if num_keep == end - begin:
            return torch.arange(begin, end, device=tokens.device), tokens[0]
        selection, has_patch = self._selection(item, tokens, grid, begin, num_keep)
        content = gather_tokens(tokens, selection.indices)
        if selection.embeddings is not None:
            content = selection.embeddings.to(content.dtype)
        elif selection.features is not None:
            merged = self.projected(selection.features[0]).unsqueeze(0).to(content.dtype)
            is_merged = gather_tokens(has_patch, selection.indices).unsqueeze(-1)
            content = torch.where(is_merged, merged, content)
        return selection.indices[0] + begin, content[0]

    def _selection(
        self, item: Item, tokens: torch.Tensor, grid: Grid3 | None, begin: int, num_keep: int
    ) -> tuple[Selection, torch.Tensor | None]:
        length, device = tokens.shape[1], tokens.device
        read = {name: self.of_tokens(item, name, values) for name, values in item.read.items()}
        read = {name: values[begin : begin + length].unsqueeze(0) for name, values in read.items()}
        features = read.get("features")
        has_patch = None if features is None else ~features[..., 0].isnan()
        heads = read["keys"].shape[-2] if "keys" in read else None
        visual = VisualTokens(
            embeddings=tokens,
            image_keys=self.key(item, begin, length).to(device),
            attention=read.get("attention"),
            is_overview=self.overview(item)[begin : begin + length].unsqueeze(0),
            grid=grid,
            coordinates=None if grid is None else coordinates_of(grid, length).to(device).unsqueeze(0),
            features=None if features is None else features.masked_fill(~has_patch.unsqueeze(-1), 0),
            can_project=features is not None and self.projected(features[0, :1].nan_to_num()) is not None,
            keys=read["keys"].flatten(-2) if "keys" in read else None,
            num_heads=heads,
        )
        return item.selector.pick(visual, num_keep), has_patch


def _let_positions_through(vllm_config: VllmConfig) -> None:
    """Have vLLM ask the model for positions while it prunes, as it does for videos that it prunes itself."""
    object.__setattr__(vllm_config.model_config.multimodal_config, "is_multimodal_pruning_enabled", _yes)
    if vllm_config.device_config.device_type == "cpu":
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        # On a CPU, vLLM 0.32 doesn't look at it.
        CPUModelRunner.is_multimodal_pruning_enabled = property(_asks_for_positions, lambda runner, value: None)


def _asks_for_positions(runner: Any) -> bool:
    model: nn.Module | None = getattr(runner, "model", None)
    return bool(getattr(model, "carries_positions", False))


def _yes() -> bool:
    return True
