"""Writes as few placeholders into a prompt as visual tokens are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PromptReplacement, PromptUpdate, PromptUpdateDetails

from vltok.methods import Selector
from vltok.serving.options import FIELD, REQUEST, Pruning, identity, reads_of_tower, to_numbers, without_budget
from vltok.tokens import Grid3, keep_count

BUDGET = "vltok_budget"  # travels with an image: (visual tokens, keep_ratio or NaN, num_keep or NaN), float64


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
        largest = pruning.largest
        if type(largest).budget is not Selector.budget or largest.per == "frame":
            return most  # how many are kept hangs on the grid, and may be all
        return {kind: keep_count(count, largest.keep_ratio, largest.num_keep) for kind, count in most.items()}


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

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """What vLLM measures memory with: as many tokens as a request may ask for."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.pruning is not None:
            most = {key: getattr(self.pruning.largest, name) for key, name in REQUEST.items()}
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, **most}
        return inputs

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        if self.pruning is None:
            return hashes
        own = identity(self.pruning.of_request(inputs.hf_processor_mm_kwargs))
        own = hashlib.sha256(own.encode()).hexdigest()[:16]
        return {kind: [f"{each}-{own}" for each in values] for kind, values in hashes.items()}

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
            return self.written(replace(details, full=ids), kind)

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
