"""Parts of a model as it is now: what runs inside a wrapper, and what attends in a layer."""

from __future__ import annotations

from torch import nn

_ATTENTION = ("self_attn", "attention", "attn")


def live(module: nn.Module) -> nn.Module:
    """The copy of a part that runs now, where PEFT keeps several of it (`modules_to_save`); else the part itself."""
    children = dict(module.named_children())
    copies = children.get("modules_to_save")
    if "original_module" not in children or not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    is_off = getattr(module, "disable_adapters", False) or not active
    return children["original_module"] if is_off else copies[active[0]]


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer or of a block of a vision tower, or None if no name is known."""
    return next(
        (getattr(layer, name) for name in _ATTENTION if isinstance(getattr(layer, name, None), nn.Module)), None
    )
