"""Writes as few placeholders into a prompt as visual tokens are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import (
    MultiModalProcessingResult,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from vltok.methods import Selector
from vltok.serving.options import (
    FIELD,
    REQUEST,
    Pruning,
    check_unasked,
    identity,
    reads_of_tower,
    to_numbers,
    without_budget,
)
from vltok.serving.vllm.config import check_reach, has_axes
from vltok.tokens import Grid3

BUDGET = "vltok_budget"  # travels with an image: (visual tokens, keep_ratio or NaN, num_keep or NaN), float64


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """What stands in a prompt for an image, also when the image itself is found in a cache.

    Attributes:
        ahead: By how much more than its tokens it moves the positions of what stands behind it.
    """

    ahead: int = 0


class PrunedInfo:
    """Stands before a processing info of vLLM, and says how many tokens an image has at most."""

    refused: ClassVar[Mapping[str, str]] = {}  # kinds that can't be pruned, with the reason

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits = super().get_supported_mm_limits()
        pruning = Pruning.of_config(self.get_hf_config())
        return limits if pruning is None else {kind: most for kind, most in limits.items() if kind not in self.refused}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Refuse what can't be pruned."""
        if num_items and modality in self.refused and Pruning.of_config(self.get_hf_config()) is not None:
            raise ValueError(
                f"a {modality} can't be pruned in this model: {self.refused[modality]}; give images, or serve the "
                f"model without {FIELD}"
            )
        super().validate_num_items(modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        pruning = Pruning.of_config(self.get_hf_config())
        if most is None or pruning is None:
            return most
        return {kind: pruning.most(count, kind) for kind, count in most.items()}


class PrunedProcessor:
    """Stands before a processor of vLLM. A subclass says in `grid_of` which grid the tokens of an image form."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning = Pruning.of_config(self.info.get_hf_config())

    def grid_of(self, item: MultiModalKwargsItem, kind: str, num_tokens: int) -> Grid3 | None:
        """Frames, rows and columns that the tokens of an image or video form, or None."""
        return None

    def tiles_of(self, item: MultiModalKwargsItem) -> int:
        """Tiles of an image that are told apart; they may have budgets of their own."""
        return 1

    def written(self, details: PromptUpdateDetails, kind: str) -> PromptUpdateDetails:
        """What stands in a prompt for an image or video, of which the first placeholders are left."""
        return details

    def span_of(self, item: MultiModalKwargsItem, kind: str, num_tokens: int) -> int:
        """How many positions an image or video takes, or more."""
        return num_tokens

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """What vLLM measures memory with: as many tokens as a request may ask for."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.pruning is not None:
            most = {key: getattr(self.pruning.largest, name) for key, name in REQUEST.items()}
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, **most}
            inputs.prompt = [*inputs.prompt, 0]  # a word behind the images, as `apply` wants it
        return inputs

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        if self.pruning is None:
            check_unasked(inputs.hf_processor_mm_kwargs)
            return hashes
        own = identity(self.pruning.of_request(inputs.hf_processor_mm_kwargs))
        own = hashlib.sha256(own.encode()).hexdigest()[:16]
        return {kind: [f"{each}-{own}" for each in values] for kind, values in hashes.items()}

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        result = super().apply(inputs, timing_ctx)
        if self.pruning is not None and has_axes(self.info.ctx.model_config):
            length = len(result["prompt_token_ids"])
            places = [place for kind in result["mm_placeholders"].values() for place in kind]
            if any(place.offset + place.length == length for place in places):
                raise ValueError("the prompt ends with an image or video; put a word or a mark behind it")
        return result

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> MultiModalProcessingResult:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)
        if self.pruning is not None:
            updates = [update for kind in result.prompt_updates.values() for item in kind for update in item]
            ahead = sum(getattr(update.content, "ahead", 0) for update in updates)
            check_reach(self.info.ctx.model_config, self.pruning.selector, ahead)
        return result

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items, without_budget(hf_kwargs))

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, without_budget(hf_processor_mm_kwargs))

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        options = without_budget(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, options, out_mm_kwargs)
        if self.pruning is None:
            return updates
        return [self._pruned(update, hf_processor_mm_kwargs, out_mm_kwargs) for update in updates]

    def _pruned(self, update: PromptReplacement, options: Mapping[str, object], items: Any) -> PromptReplacement:
        """The same update with as many placeholders as are kept, whose budget is noted in the items."""
        kind = update.modality
        selector = self.pruning.of_request(options)

        def replacement(number: int) -> PromptUpdateDetails:
            content = update.content(number) if callable(update.content) else update.content
            details = content if isinstance(content, PromptUpdateDetails) else PromptUpdateDetails.from_seq(content)
            is_embed = torch.ones(len(details.full), dtype=torch.bool)
            if details.is_embed is not None:
                is_embed = details.is_embed(details.full)
            item, count = items[kind][number], int(is_embed.sum())
            _check_seen(item, kind, selector)
            grid, tiles = self.grid_of(item, kind, count), self.tiles_of(item) if kind == "image" else 1
            kept = self.pruning.count(selector, count, grid, kind, tiles)
            data = torch.tensor([count, *to_numbers(selector)], dtype=torch.float64)
            item[BUDGET] = MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=True))
            stays = ~is_embed | (is_embed.cumsum(0) <= kept)
            ids = torch.tensor(details.full)[stays].tolist()
            details = self.written(replace(details, full=ids), kind)
            return PrunedDetails(details.full, details.is_embed, max(0, self.span_of(item, kind, count) - kept))

        return PromptReplacement(modality=kind, target=update.target, replacement=replacement)


def _check_seen(item: MultiModalKwargsItem, kind: str, selector: Selector) -> None:
    """Raise ValueError if an image comes as embeddings, and what the selector looks at is not among them."""
    wanted = sorted(reads_of_tower(selector))
    if wanted and f"{kind}_embeds" in item:
        raise ValueError(
            f"{selector.name} looks at {' and '.join(wanted)} in the vision tower, which {kind}s that come as "
            "embeddings haven't been through; give pixels, or serve with a method that needs no more than "
            "embeddings, such as divprune"
        )
