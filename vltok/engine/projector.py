"""Putting another projector into a vision-language model: what it stands between, and what must follow it.

A projector may have been made for several scale factors. Then the projector, the methods of the model that count
patches, and the processor ask at every call which one counts for their thread. Nothing is set for the time of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from vltok.edits import Edits, MethodWrapper
from vltok.engine.guard import PROJECTOR_GUARD
from vltok.engine.instead import Instead
from vltok.engine.tower_layout import patch_grid
from vltok.engine.weights import check_at_hand
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.method import Run
from vltok.report import Condensed
from vltok.views import ProjectorSite, ScaleChoice

# Methods of processors that read what they count placeholders by.
_WRITERS = ("replace_image_token", "replace_video_token", "_get_num_multimodal_tokens")


@dataclass(frozen=True)
class ProjectorChanges:
    """What follows a projector that makes fewer tokens.

    Attributes:
        config: Fields of the model's config, with what they hold from then on.
        counted: What the processor counts placeholders by: each field with its value now, and from then on.
        shared: Further fields of the processor, with what they must hold.
    """

    config: dict[str, Any]
    counted: dict[str, tuple[Any, Any]]
    shared: dict[str, Any]


def projector_site(model: nn.Module, strategy: str, levels: str = "vision_feature_layer") -> ProjectorSite:
    """Say where the projector of a model stands that has a CLIP-like tower and `multi_modal_projector`.

    Args:
        model: The model.
        strategy: Which rows of the tower the projector gets: "default" is all but the first, "full" is all.
        levels: Field of the config that says which hidden states it reads.

    Raises:
        UnsupportedModelError: If the projector gets other rows than patches, or has no weights at hand.
    """
    config, vision = model.config, model.config.vision_config
    has_cls = vision.model_type == "clip_vision_model"
    if has_cls != (strategy == "default"):
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r} "
            f"{'leaves the [CLS] token among' if has_cls else 'takes the first patch from'} the patches of a "
            f"{vision.model_type}, so they form no grid; set it to {'default' if has_cls else 'full'!r} in model and "
            "processor"
        )
    old = model.multi_modal_projector
    check_at_hand(old, "the projector", model)
    layers = (getattr(old, "linear_1", None), getattr(old, "linear_2", None))
    is_mlp = config.projector_hidden_act == "gelu" and all(
        isinstance(layer, nn.Linear) and layer.weight.is_floating_point()
        for layer in layers  # not quantized
    )
    known = {parameter for layer in layers if layer is not None for parameter in layer.parameters()}
    return ProjectorSite(
        old=old,
        layers=layers if is_mlp and known == set(old.parameters()) else None,
        grid=patch_grid(vision),
        dim=vision.hidden_size,
        hidden=config.text_config.hidden_size,
        depth=vision.num_hidden_layers,
        levels=hidden_states_of(getattr(config, levels), vision.num_hidden_layers),
    )


def hidden_states_of(given: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Hidden states in 0..depth, 0 the embeddings, of Python indices as configs have them."""
    return tuple(level % (depth + 1) for level in ([given] if isinstance(given, int) else given))


def merging_changes(model: nn.Module, strategy: str, num_merged: int) -> ProjectorChanges:
    """What follows a tower that hands on fewer tokens than patches, where a processor counts patches and [CLS].

    Args:
        model: The model.
        strategy: As for `projector_site`.
        num_merged: How many fewer.
    """
    extra, config = int(strategy == "default"), model.config  # [CLS], which the processor adds and takes off again
    return ProjectorChanges(
        config={},
        counted={"num_additional_image_tokens": (extra, extra - num_merged)},
        shared={
            "patch_size": config.vision_config.patch_size,
            "image_token_id": config.image_token_id,
            "vision_feature_select_strategy": strategy,
        },
    )


def swap_projector(
    edits: Edits,
    run: Run,
    model: nn.Module,
    processor: Any,
    projector: nn.Module,
    changes: dict[int, ProjectorChanges],
    scales: ScaleChoice,
) -> dict[str, dict[str, Any]]:
    """Swap the projector, and make config and processor follow it.

    Args:
        edits: The ledger.
        run: Where the report goes.
        model: The model.
        processor: Its processor.
        projector: What takes the projector's place.
        changes: What follows it, for each of its scale factors.
        scales: The scale factors. Config and fields of the processor hold what belongs to the first.

    Returns:
        What fields of "config" and "processor" held before.

    Raises:
        ValueError: If the processor is missing or doesn't belong to the model.
    """
    first = changes[scales.every[0]]
    check_processor(processor, first)
    counted = {scale: {name: then for name, (_, then) in each.counted.items()} for scale, each in changes.items()}
    followers = {
        "config": (model.config, {**first.config, "projector_hidden_act": PROJECTOR_GUARD}),
        "processor": (processor, counted[scales.every[0]]),
    }
    before = {part: {name: getattr(target, name) for name in fields} for part, (target, fields) in followers.items()}
    edits.swap(model, "multi_modal_projector", projector)
    edits.after(projector, _Note(run).after_projector)
    for target, fields in followers.values():
        for name, value in fields.items():
            edits.set_attribute(target, name, value)
    if len(scales.every) > 1:
        _let_scales_take_turns(edits, model, processor, projector, counted, scales)
    return before


def _let_scales_take_turns(
    edits: Edits,
    model: nn.Module,
    processor: Any,
    projector: nn.Module,
    counted: dict[int, dict[str, Any]],
    scales: ScaleChoice,
) -> None:
    """Make projector and processor ask at each call which scale factor counts."""
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise ValueError(
            f"{type(processor).__name__} leaves it to another processor to write placeholders; with several scale "
            "factors pass that one: vltok.apply(model, method, processor=processor)"
        )
    edits.before(projector, _Told(model, scales).before_projector)
    edits.wrap_method(model, "get_placeholder_mask", _Explained(scales))
    for name in _WRITERS:
        edits.wrap_method(processor, name, _Counted(scales, counted))


def scales_of(processor: Any) -> ScaleChoice | None:
    """The scale factors that may take turns in what a processor writes; None where there is at most one."""
    writer = vars(processor).get(_WRITERS[0])
    return writer.scales if isinstance(writer, _Counted) else None


def check_processor(processor: Any, changes: ProjectorChanges) -> None:
    """Raise ValueError unless the processor writes a placeholder for each token that this model's projector gives."""
    remedy = "pass the model's own: vltok.apply(model, method, processor=processor)"
    if processor is None:
        raise ValueError(
            f"this method changes how many placeholders an image gets, so it needs the processor; {remedy}"
        )
    expected = {name: now for name, (now, _) in changes.counted.items()} | changes.shared
    missing = [name for name in expected if not hasattr(processor, name)]
    if missing:
        raise ValueError(f"{type(processor).__name__} is no processor of this model: no {', '.join(missing)}; {remedy}")
    for name, value in expected.items():
        found = getattr(processor, name)
        if found != value:
            is_counted = name in changes.counted
            hint = "; was it saved, or is it in use, while a projector is replaced? Set it back" if is_counted else ""
            raise ValueError(f"the processor's {name} is {found!r}, the model's {value!r}{hint}; {remedy}")


class _Note:
    """Leaves the number of pictures, patches and tokens of the last call in the run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        patches = (args[0] if args else next(iter(kwargs.values()))).shape[1]
        self.run.report("condensed", Condensed(pictures=output.shape[0], patches=patches, tokens=output.shape[1]))


class _Told:
    """Tells a projector the scale factor that counts.

    A copy of the projector alone, as PEFT makes for `modules_to_save`, goes on asking what the model's handle says.
    """

    def __init__(self, model: nn.Module, scales: ScaleChoice) -> None:
        self.model, self.scales = model, scales

    def __deepcopy__(self, memo: dict[int, Any]) -> _Told:
        if id(self.model) not in memo:
            return self
        twin = memo[id(self)] = _Told(memo[id(self.model)], copy.deepcopy(self.scales, memo))
        return twin

    def before_projector(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "scale_factor": self.scales.now}


class _Counted(MethodWrapper):
    """Lets a method of a processor read what it counts by as the scale factor that counts has it."""

    def __init__(self, scales: ScaleChoice, fields: dict[int, dict[str, Any]]) -> None:
        self.scales, self.fields = scales, fields

    def __deepcopy__(self, memo: dict[int, Any]) -> _Counted:
        if id(self.owner) not in memo:  # what the processor says of itself copies its fields, and needs no tokenizer
            return self
        twin = memo[id(self)] = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        twin = copy.copy(self.owner)  # other threads may be using the processor at another scale
        for name in _WRITERS:
            vars(twin).pop(name, None)
        for name, value in self.fields[self.scales.now].items():
            setattr(twin, name, value)
        return getattr(twin, self.name)(*args, **kwargs)


class _Explained(MethodWrapper):
    """Says what may be wrong where a prompt has more or fewer placeholders than there are visual tokens."""

    def __init__(self, scales: ScaleChoice) -> None:
        self.scales = scales

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except ValueError as error:
            raise UnsupportedInputError(
                f"{error}; this call ran with scale_factor={self.scales.now} of {self.scales.every}: let the processor "
                "and the model run in the same thread and in the same block of handle.using(scale_factor=...)"
            ) from error


class CoarserPatches:
    """A method of a model that reads the config as if patches were `scale` times as wide and high.

    It looks the method up on its owner's class at each call, so a deepcopy of the owner calls its own.
    """

    def __init__(self, owner: nn.Module, name: str, scales: ScaleChoice) -> None:
        self._owner, self._name, self._scales = owner, name, scales

    @property
    def scale(self) -> int:
        """The scale factor that counts for the calls of this thread."""
        return self._scales.now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, vision = self._owner, self._owner.config.vision_config
        coarser = Instead(vision, patch_size=vision.patch_size * self.scale)
        stand_in = Instead(owner, config=Instead(owner.config, vision_config=coarser))
        return getattr(type(owner), self._name)(stand_in, *args, **kwargs)
