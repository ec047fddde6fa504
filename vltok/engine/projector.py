"""Putting another projector into a LLaVA-like model: what it stands between, and what must follow it."""

from __future__ import annotations

from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.engine.guard import PROJECTOR_GUARD
from vltok.engine.weights import check_at_hand
from vltok.errors import UnsupportedModelError
from vltok.method import Run
from vltok.report import Condensed
from vltok.views import ProjectorSite


def projector_site(model: nn.Module) -> ProjectorSite:
    """Say where the projector of a model stands that has a CLIP-like tower and `multi_modal_projector`.

    Raises:
        UnsupportedModelError: If the projector gets other rows than patches, or has no weights at hand.
    """
    config, vision = model.config, model.config.vision_config
    old = model.multi_modal_projector
    has_cls = vision.model_type == "clip_vision_model"
    if has_cls != (config.vision_feature_select_strategy == "default"):
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} "
            f"{'leaves the [CLS] token among' if has_cls else 'takes the first patch from'} the patches of a "
            f"{vision.model_type}, so they form no grid; set it to {'default' if has_cls else 'full'!r} in model and "
            "processor"
        )
    check_at_hand(old, "the projector", model)
    layers = (getattr(old, "linear_1", None), getattr(old, "linear_2", None))
    is_mlp = config.projector_hidden_act == "gelu" and all(
        isinstance(layer, nn.Linear) and layer.weight.is_floating_point()
        for layer in layers  # not quantized
    )
    given = config.vision_feature_layer
    depth = vision.num_hidden_layers
    side = vision.image_size // vision.patch_size
    return ProjectorSite(
        old=old,
        layers=layers if is_mlp else None,
        grid=(side, side),
        dim=vision.hidden_size,
        hidden=config.text_config.hidden_size,
        depth=depth,
        levels=tuple(level % (depth + 1) for level in ([given] if isinstance(given, int) else given)),
    )


def swap_projector(
    edits: Edits,
    run: Run,
    model: nn.Module,
    processor: Any,
    fields: dict[str, tuple[Any, Any]],
    projector: nn.Module,
    levels: tuple[int, ...],
    scale: int,
) -> dict[str, dict[str, Any]]:
    """Swap the projector, and make config and processor follow it.

    Returns:
        What fields of "config" and "processor" held before.

    Raises:
        ValueError: If the processor is missing or doesn't belong to the model.
    """
    check_processor(model, processor, {name: now for name, (now, _) in fields.items()})
    vision = model.config.vision_config
    config_fields = {"vision_feature_layer": list(levels), "projector_hidden_act": PROJECTOR_GUARD}
    if hasattr(model.config, "image_seq_length"):
        config_fields["image_seq_length"] = (vision.image_size // vision.patch_size // scale) ** 2
    changes = {
        "config": (model.config, config_fields),
        "processor": (processor, {name: then for name, (_, then) in fields.items()}),
    }
    before = {part: {name: getattr(target, name) for name in fields} for part, (target, fields) in changes.items()}
    edits.swap(model, "multi_modal_projector", projector)
    edits.after(projector, _Note(run).after_projector)
    for target, fields in changes.values():
        for name, value in fields.items():
            edits.set_attribute(target, name, value)
    return before


def check_processor(model: nn.Module, processor: Any, fields: dict[str, Any]) -> None:
    """Raise ValueError unless the processor writes a placeholder for each patch that this model's projector gets."""
    remedy = "pass the model's own: vltok.apply(model, method, processor=processor)"
    if processor is None:
        raise ValueError(
            f"this method changes how many placeholders a picture gets, so it needs the processor; {remedy}"
        )
    config = model.config
    expected = {
        **fields,
        "image_token_id": config.image_token_id,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    missing = [name for name in expected if not hasattr(processor, name)]
    if missing:
        raise ValueError(f"{type(processor).__name__} is no processor of this model: no {', '.join(missing)}; {remedy}")
    for name, value in expected.items():
        found = getattr(processor, name)
        if found != value:
            hint = (
                "; was it saved, or is it in use, while a projector is replaced? Set it back" if name in fields else ""
            )
            raise ValueError(f"the processor's {name} is {found!r}, the model's {value!r}{hint}; {remedy}")


class _Note:
    """Leaves the number of pictures, patches and tokens of the last call in the run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        patches = (args[0] if args else next(iter(kwargs.values()))).shape[1]
        self.run.report("condensed", Condensed(pictures=output.shape[0], patches=patches, tokens=output.shape[1]))


class CoarserPatches:
    """A method of a model that reads the config as if patches were `scale` times as wide and high.

    It looks the method up on its owner's class at each call, so a deepcopy of the owner calls its own.
    """

    def __init__(self, owner: nn.Module, name: str, scale: int) -> None:
        self._owner, self._name, self.scale = owner, name, scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, vision = self._owner, self._owner.config.vision_config
        coarser = _With(vision, patch_size=vision.patch_size * self.scale)
        stand_in = _With(owner, config=_With(owner.config, vision_config=coarser))
        return getattr(type(owner), self._name)(stand_in, *args, **kwargs)


class _With:
    """Stands for an object some of whose attributes are others."""

    def __init__(self, base: object, **replaced: object) -> None:
        self._base = base
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
