"""VlmView: a vision-language model as methods see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.engine.guard import PROJECTOR_GUARD, mark_checkpoint
from vltok.engine.projector import check_processor
from vltok.engine.pruning import PruningEngine
from vltok.engine.text_tower import TextTower
from vltok.engine.token_merging import is_merging
from vltok.errors import UnsupportedModelError
from vltok.families import find_tower
from vltok.families.towers import TOWERS
from vltok.families.towers.view import TowerView
from vltok.families.vlm.base import VlmFamily
from vltok.method import Run
from vltok.tokens import patches_left
from vltok.views import LanguageView, ProjectorSite, ProjectorView, ScaleChoice, TokenMerger, VisionView
from vltok.visual import TokenRule, TokenSelector


class VlmView(LanguageView, ProjectorView):
    """A vision-language model, its parts found by its family."""

    def __init__(
        self, family: VlmFamily, model: nn.Module, whole: nn.Module, processor: Any, text_tower: Any = None
    ) -> None:
        self.family = family
        self.processor = processor
        self.host = model
        self._text_tower = None if text_tower is None else TextTower(text_tower, processor)
        self._head = whole if whole is not model else None
        self._engine: PruningEngine | None = None
        self._tower: TowerView | None = None
        self._restore: dict[str, dict[str, Any]] = {}

    @property
    def vision(self) -> VisionView:
        if self._tower is None:
            tower = self.family.tower(self.host)
            self._tower = find_tower(tower)
            if self._tower is None:
                raise UnsupportedModelError(
                    f"the vision tower of {self.family.title}, {type(tower).__name__}, is not one whose blocks vltok "
                    f"knows; those that are: {', '.join(TOWERS)}"
                )
        return self._tower

    def on_visual_tokens(self, edits: Edits, run: Run, selector: TokenSelector) -> None:
        self._pruning(edits, run).use_selector(selector)

    def on_decoder_layers(self, edits: Edits, run: Run, rule: TokenRule) -> None:
        self._pruning(edits, run).use_rule(rule)

    def merging_blocks(self) -> int:
        first = min(self._merging_site().levels)
        if first == 0:
            raise UnsupportedModelError(
                "the projector of this model reads the vision tower's embeddings, before any block merges tokens; set "
                "vision_feature_layer to hidden states behind a block"
            )
        return first

    def merge_tokens(self, edits: Edits, run: Run, merges: Sequence[int], merger: TokenMerger) -> None:
        site = self._merging_site()
        patches = math.prod(site.grid)
        if self._engine is not None or self._is_pruned():
            raise ValueError(
                "the visual tokens of this model are already being pruned, by positions that merging would move; "
                "remove that handle first, pruning and merging in the vision tower don't go together"
            )
        changes = self.family.merging_changes(self.host, patches - patches_left(patches, merges))
        check_processor(self.processor, changes)
        self.vision.merge_tokens(edits, run, merges, merger)
        for name, (_, then) in changes.counted.items():
            edits.set_attribute(self.processor, name, then)

    def _merging_site(self) -> ProjectorSite:
        self.family.merging_changes(self.host, 0)
        if getattr(self.host.config, "projector_hidden_act", None) == PROJECTOR_GUARD:
            raise ValueError(
                "the projector of this model was replaced by one that reads a grid of patches, which merged tokens "
                "don't form; remove that handle first, the two don't go together"
            )
        self.vision.merging_blocks()
        return self.family.projector_site(self.host)

    def projector_site(self) -> ProjectorSite:
        return self.family.projector_site(self.host)

    def swap_projector(
        self, edits: Edits, run: Run, projector: nn.Module, levels: tuple[int, ...], scales: ScaleChoice
    ) -> None:
        self._check_unmerged()
        if self._engine is not None or self._is_pruned():
            raise ValueError(
                "the tokens that the projector in place returns are already being pruned; replace the projector first: "
                "vltok.apply(model, [projector method, pruning method], processor=processor)"
            )
        self._restore = self.family.swap_projector(edits, run, self.host, self.processor, projector, levels, scales)

    def mark_checkpoint(self, edits: Edits, settings: dict[str, Any]) -> None:
        """Note in the model's config what is on it, so that a checkpoint saved meanwhile says how to load it."""
        tower = {} if self._tower is None else {"vision_config": self._tower.restore}
        mark_checkpoint(edits, self.host.config, settings, self._restore | tower)

    def _check_unmerged(self) -> None:
        if is_merging(self.host):
            raise ValueError(
                "tokens are merged in the vision tower of this model, so those behind it form no grid; remove that "
                "handle first, this method and merging don't go together"
            )

    def _is_pruned(self) -> bool:
        hooks = self.host._forward_pre_hooks.values()
        return any(isinstance(getattr(hook, "__self__", None), PruningEngine) for hook in hooks)

    def _pruning(self, edits: Edits, run: Run) -> PruningEngine:
        if self._engine is None:
            self._check_unmerged()
            if self._is_pruned():
                raise ValueError(
                    "this model's visual tokens are already pruned; remove that handle first, or apply the methods "
                    "together: vltok.apply(model, [first, second])"
                )
            self._engine = PruningEngine(self.family, self.host, self.processor, self._text_tower, edits, run)
            self._engine.install(self._head)
        return self._engine
