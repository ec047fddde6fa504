"""The model families: where the parts of a model are. Imported only when a model of theirs is met.

A family is one file and one line in `VLMS` or `TOWERS`: its name -> (module that defines the model class, our file, our
class in it).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from vltok.edits import Edits
from vltok.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vltok.families.tower import TowerView
    from vltok.families.vlm import VlmView

VLMS = {
    "llava": ("transformers.models.llava", "llava", "Llava"),
    "llava_next": ("transformers.models.llava_next", "llava_next", "LlavaNext"),
    "llava_onevision": ("transformers.models.llava_onevision", "llava_onevision", "LlavaOnevision"),
    "qwen2_5_vl": ("transformers.models.qwen2_5_vl", "qwen2_5_vl", "Qwen2_5_VL"),
    "internvl": ("transformers.models.internvl", "internvl", "InternVL"),
}
TOWERS = {
    "clip": ("transformers.models.clip", "hf_vit", "Clip"),
    "siglip": ("transformers.models.siglip", "hf_vit", "Siglip"),
    "vit": ("transformers.models.vit", "hf_vit", "ViT"),
    "dinov2": ("transformers.models.dinov2", "hf_vit", "Dinov2"),
    "dinov2_with_registers": ("transformers.models.dinov2_with_registers", "hf_vit", "Dinov2WithRegisters"),
    "timm_vit": ("timm.models.vision_transformer", "timm_vit", "VisionTransformer"),
    "timm_eva": ("timm.models.eva", "timm_vit", "Eva"),
    "tap_backbone": ("vltok.models.tap_layers", "tap_backbone", "TapBackbone"),
}

CONFIG_FIELD = "vltok"  # of a model's config: what was on it when it was saved


def view(model: nn.Module, processor: Any = None) -> VlmView | TowerView:
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
    if found := _find(model, VLMS):
        from vltok.families.vlm import VlmView

        family, part = found
        family.check(part)
        return VlmView(family, part, processor)
    if tower := find_tower(model):
        return tower
    raise unsupported(model)


def find_tower(model: nn.Module) -> TowerView | None:
    """The vision tower in a model, or None if it has none of a known family."""
    if found := _find(model, TOWERS):
        from vltok.families.tower import TowerView

        return TowerView(*found, model)
    return None


def mark_checkpoint(edits: Edits, config: Any, settings: dict[str, Any], restore: dict[str, dict[str, Any]]) -> None:
    """Note in a config what is on its model, so that a checkpoint saved meanwhile says how to load it.

    Args:
        edits: The ledger of the handle.
        config: The config.
        settings: Methods of the handle, see `vltok.api.settings`; those of earlier handles stay before them.
        restore: What fields of "config", "vision_config" and "processor" held before.
    """
    if before := getattr(config, CONFIG_FIELD, None):
        settings = {**settings, "methods": [*before["methods"], *settings["methods"]]}
        groups = restore.keys() | before["restore"].keys()
        restore = {group: restore.get(group, {}) | before["restore"].get(group, {}) for group in sorted(groups)}
    edits.set_attribute(config, CONFIG_FIELD, {**settings, "restore": restore})


def unsupported(model: nn.Module) -> UnsupportedModelError:
    """What to say of a model that visual tokens don't pass through, as far as vltok can tell."""
    return UnsupportedModelError(
        f"{type(model).__name__} has no visual tokens that vltok can reach: no part of it is one of the supported "
        f"families ({', '.join(VLMS)}); a vision tower or a text model alone has no language model that visual tokens "
        f"enter. Methods that change a vision tower itself know the families {', '.join(TOWERS)}, alone or in a LLaVA"
    )


def _find(model: nn.Module, table: dict[str, tuple[str, str, str]]) -> tuple[Any, nn.Module] | None:
    """The family of the first part of a model that is in a table, and that part."""
    for part in model.modules():
        for base in type(part).__mro__:
            for origin, file, name in table.values():
                if base.__module__ == origin or base.__module__.startswith(f"{origin}."):
                    family = getattr(import_module(f"{__name__}.{file}"), name)()
                    if base.__name__ in family.model_classes:
                        return family, part
    return None
