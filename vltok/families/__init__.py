"""The model families: where the parts of a model are. Imported only when a model of theirs is met.

A family is one file and one line in `FAMILIES`: the package that defines the model class -> (our module, our class).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from vltok.edits import Edits
from vltok.errors import UnsupportedModelError
from vltok.method import Run
from vltok.views import LanguageView, ProjectorSite, ProjectorView, RelevanceJudge, TokenSelector

if TYPE_CHECKING:
    from vltok.families.base import VlmFamily
    from vltok.families.pruning import PruningEngine

FAMILIES = {
    "transformers.models.llava": ("llava", "Llava"),
    "transformers.models.llava_next": ("llava_next", "LlavaNext"),
    "transformers.models.llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "transformers.models.qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL"),
    "transformers.models.internvl": ("internvl", "InternVL"),
}

CONFIG_FIELD = "vltok"  # of a model's config: what was on it when it was saved


class VlmView(LanguageView, ProjectorView):
    """A vision-language model, its parts found by its family."""

    def __init__(self, family: VlmFamily, model: nn.Module, processor: Any) -> None:
        self.family = family
        self.processor = processor
        self.host = model
        self._engine: PruningEngine | None = None
        self._restore: dict[str, dict[str, Any]] = {}

    def on_visual_tokens(self, edits: Edits, run: Run, selector: TokenSelector) -> None:
        self._pruning(edits, run).use_selector(edits, self.host, selector)

    def on_decoder_layers(self, edits: Edits, run: Run, judge: RelevanceJudge) -> None:
        self._pruning(edits, run).use_judge(edits, self.host, judge)

    def projector_site(self) -> ProjectorSite:
        return self.family.projector_site(self.host)

    def swap_projector(
        self, edits: Edits, run: Run, projector: nn.Module, levels: tuple[int, ...], scale_factor: int
    ) -> None:
        if self._engine is not None or self._is_pruned():
            raise ValueError(
                "the tokens that the projector in place returns are already being pruned; replace the projector first: "
                "vltok.apply(model, [projector method, pruning method], processor=processor)"
            )
        self._restore = self.family.swap_projector(
            edits, run, self.host, self.processor, projector, levels, scale_factor
        )

    def mark_checkpoint(self, edits: Edits, settings: dict[str, Any]) -> None:
        """Note in the model's config what is on it, so that a checkpoint saved meanwhile says how to load it."""
        edits.set_attribute(self.host.config, CONFIG_FIELD, {**settings, "restore": self._restore})

    def _is_pruned(self) -> bool:
        from vltok.families.pruning import PruningEngine

        hooks = self.host._forward_pre_hooks.values()
        return any(isinstance(getattr(hook, "__self__", None), PruningEngine) for hook in hooks)

    def _pruning(self, edits: Edits, run: Run) -> PruningEngine:
        from vltok.families.pruning import PruningEngine

        if self._engine is None:
            if self._is_pruned():
                raise ValueError(
                    "this model's visual tokens are already pruned; remove that handle first, or apply the methods "
                    "together: vltok.apply(model, [first, second])"
                )
            self.family.check_pruning(self.host)
            self._engine = PruningEngine(self.family, run)
            self._engine.install(edits, self.host)
        return self._engine


def view(model: nn.Module, processor: Any = None) -> VlmView:
    """Find the family of a model, also inside a wrapper (PEFT, DDP, the class with the language-model head).

    Args:
        model: The model.
        processor: Its processor, for methods that change the placeholders.

    Raises:
        TypeError: If `model` is not an nn.Module.
        UnsupportedModelError: If no part of it belongs to a known family, or this member can't be handled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply() takes a model (torch.nn.Module), got {type(model).__name__}")
    for module in model.modules():
        for base in type(module).__mro__:
            package = base.__module__.rpartition(".")[0]
            if package not in FAMILIES:
                continue
            file, name = FAMILIES[package]
            family = getattr(import_module(f"{__name__}.{file}"), name)()
            if base.__name__ == family.model_class:
                family.check(module)
                return VlmView(family, module, processor)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no visual tokens that vltok can reach: no part of it is one of the supported "
        f"families ({', '.join(package.rpartition('.')[2] for package in FAMILIES)}); a vision tower or a text model "
        "alone has no language model that visual tokens enter"
    )
