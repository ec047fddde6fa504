"""The model families: where the parts of a model are. Imported only when a model of theirs is met.

A family is one file and one line in the table of `families/vlm/__init__.py` or `families/towers/__init__.py`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from vltok.errors import UnsupportedModelError
from vltok.families import towers, vlm

if TYPE_CHECKING:
    from vltok.families.towers.view import TowerView
    from vltok.families.vlm.view import VlmView


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
    if found := _find(model, vlm, vlm.VLMS):
        from vltok.families.vlm.view import VlmView

        family, part = found
        family.check(part)
        return VlmView(family, part, processor)
    if tower := find_tower(model):
        return tower
    raise unsupported(model)


def find_tower(model: nn.Module) -> TowerView | None:
    """The vision tower in a model, or None if it has none of a known family."""
    if found := _find(model, towers, towers.TOWERS):
        from vltok.families.towers.view import TowerView

        return TowerView(*found, model)
    return None


def unsupported(model: nn.Module) -> UnsupportedModelError:
    """What to say of a model that visual tokens don't pass through, as far as vltok can tell."""
    return UnsupportedModelError(
        f"{type(model).__name__} has no visual tokens that vltok can reach: no part of it is one of the supported "
        f"families ({', '.join(vlm.VLMS)}); a vision tower or a text model alone has no language model that visual "
        f"tokens enter. Methods that change a vision tower itself know the families {', '.join(towers.TOWERS)}, alone "
        "or in a LLaVA"
    )


def _find(
    model: nn.Module, package: ModuleType, table: dict[str, tuple[str, str, str]]
) -> tuple[Any, nn.Module] | None:
    """The family of the first part of a model that is in a table, and that part."""
    for part in model.modules():
        for base in type(part).__mro__:
            for origin, file, name in table.values():
                if base.__module__ == origin or base.__module__.startswith(f"{origin}."):
                    family = getattr(import_module(f"{package.__name__}.{file}"), name)()
                    if base.__name__ in family.model_classes:
                        return family, part
    return None
