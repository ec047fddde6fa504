"""The model families: where the parts of a model are. Imported only when a model of theirs is met.

A family is one line in the table of `families/vlm/__init__.py` or `families/towers/__init__.py`, with a file where it
has something of its own to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from vltok.engine.parts import live
from vltok.errors import UnsupportedModelError
from vltok.families import towers, vlm
from vltok.families.table import Entry

if TYPE_CHECKING:
    from vltok.families.towers.view import TowerView
    from vltok.families.vlm.view import VlmView

Kind = Literal["vlm", "tower"]
_TABLES = {"vlm": vlm.VLMS, "tower": towers.TOWERS}


def supported_models() -> dict[Kind, list[str]]:
    """Names of the families that methods can be put on, by kind: "vlm", vision-language models, and "tower", ViTs."""
    return {kind: list(table) for kind, table in _TABLES.items()}


def register_family(kind: Kind, name: str, defined_in: str, module: str, class_name: str) -> None:
    """Make a family known that is not vltok's own. Nothing is imported until a model of it is met.

    Args:
        kind: "vlm" for vision-language models, "tower" for vision towers.
        name: A word for the family, which saved files use.
        defined_in: Full name of the module, or package, that defines the model's class.
        module: Full name of the module that describes the family.
        class_name: The class in it, a subclass of `vltok.families.vlm.base.VlmFamily` or
            `vltok.families.towers.base.TowerFamily`.

    Raises:
        ValueError: If the kind is unknown, or the name is taken.
    """
    if kind not in _TABLES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _TABLES))}, got {kind!r}")
    if any(name in table for table in _TABLES.values()):
        raise ValueError(f"a family named {name!r} is already registered; choose another name")
    _TABLES[kind][name] = Entry(defined_in, module, class_name)


def view(model: nn.Module, processor: Any = None) -> VlmView | TowerView:
    """Find the family of a model, also inside a wrapper (PEFT, DDP, the class with the language-model head).

    Args:
        model: The model.
        processor: Its processor, for methods that change the placeholders.

    Raises:
        TypeError: If `model` is not an nn.Module.
        UnsupportedModelError: If no part of it belongs to a known family, or several do, or this member can't be
            handled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply() takes a model (torch.nn.Module), got {type(model).__name__}")
    if found := _find(model, vlm, vlm.VLMS):
        from vltok.families.vlm.view import VlmView

        found.family.check(found.part)
        return VlmView(found.family, found.part, found.whole, processor)
    if tower := find_tower(model):
        return tower
    raise unsupported(model)


def generic_view(model: nn.Module, marks: dict[str, int], processor: Any = None) -> VlmView:
    """A model of no known family, as its parts are called in most models of transformers.

    Args:
        model: The model, or what wraps it.
        marks: The ids that stand for visual tokens, by kind; what is not there is read from the config.
        processor: Its processor.

    Raises:
        TypeError: If `model` is not an nn.Module.
        UnsupportedModelError: If no part of it has what a family needs, or no id is known.
    """
    from vltok.families.vlm.generic import Generic
    from vltok.families.vlm.view import VlmView

    if not isinstance(model, nn.Module):
        raise TypeError(f"apply() takes a model (torch.nn.Module), got {type(model).__name__}")
    path = {part: (name, parent) for name, part, parent in _live_parts(model)}
    fitting = [
        part
        for part in path
        if hasattr(part, "get_image_features")
        and hasattr(getattr(part, "language_model", getattr(part, "text_model", None)), "layers")
    ]
    if not fitting:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be pruned as a generic model: no part of it has both get_image_features() "
            "and a decoder with `layers`, called language_model or text_model; describe it with vltok.register_family()"
        )
    part = fitting[-1]  # a head may show the parts of the model in it as its own
    family = Generic("generic", type(part).__name__, (type(part).__name__,), marks=marks)
    family.check(part)
    return VlmView(family, part, _with_head(part, path), processor)


def find_tower(model: nn.Module) -> TowerView | None:
    """The vision tower in a model, or None if it has none of a known family."""
    if found := _find(model, towers, towers.TOWERS):
        from vltok.families.towers.view import TowerView

        return TowerView(found.family, found.part, model)
    return None


def unsupported(model: nn.Module) -> UnsupportedModelError:
    """What to say of a model that visual tokens don't pass through, as far as vltok can tell."""
    return UnsupportedModelError(
        f"{type(model).__name__} has no visual tokens that vltok can reach: no part of it is one of the supported "
        f"families ({', '.join(vlm.VLMS)}); a vision tower or a text model alone has no language model that visual "
        f"tokens enter. Methods that change a vision tower itself know the families {', '.join(towers.TOWERS)}, alone "
        "or in a vision-language model"
    )


@dataclass(frozen=True)
class _Found:
    """A part of a model that belongs to a family.

    Attributes:
        family: The family.
        part: The part.
        whole: The part with the head that it may have.
        name: Of the whole, as an attribute of the model.
    """

    family: Any
    part: nn.Module
    whole: nn.Module
    name: str


def _find(model: nn.Module, package: ModuleType, table: dict[str, Entry]) -> _Found | None:
    """The part of a model whose family is in a table. Parts inside it, or its head, don't count.

    Raises:
        UnsupportedModelError: If several parts are, side by side.
    """
    path: dict[nn.Module, tuple[str, nn.Module | None]] = {}
    found: list[_Found] = []
    for name, part, parent in _live_parts(model):
        path[part] = name, parent
        family = _family_of(part, package, table)
        if family is not None:
            whole = _with_head(part, path)
            found.append(_Found(family, part, whole, path[whole][0]))
    outer = [each for each in found if not any(_belongs(each, other) for other in found if other is not each)]
    if len(outer) > 1:
        kind = "vision-language models" if package is vlm else "vision towers"
        names = ", ".join(f"{each.name} ({type(each.whole).__name__})" for each in outer)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(outer)} {kind} side by side: {names}; vltok can't tell which one is "
            "meant, so pass that one, and call apply() once for each that is to be changed"
        )
    return outer[0] if outer else None


def _belongs(one: _Found, other: _Found) -> bool:
    """Whether one part is inside another, or hangs on the head of the other, as a draft model may."""
    if one.part in set(other.part.modules()):
        return True
    return one.part in set(other.whole.modules()) and other.part not in set(one.whole.modules())


def _family_of(part: nn.Module, package: ModuleType, table: dict[str, Entry]) -> Any | None:
    for base in type(part).__mro__:
        for entry in table.values():
            if base.__module__ == entry.defined_in or base.__module__.startswith(f"{entry.defined_in}."):
                own = f"{package.__name__}.{entry.module}"
                file = import_module(own if "." not in entry.module and find_spec(own) else entry.module)
                family = getattr(file, entry.class_name)(**entry.facts)
                if base.__name__ in family.model_classes:
                    return family
    return None


def _live_parts(
    module: nn.Module, name: str = "", parent: nn.Module | None = None, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """All parts of a model once, from the outside to the inside, each with its name and what it is a child of.

    Where PEFT keeps several copies of a part (`modules_to_save`), only the one that runs counts.
    """
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield name, module, parent
    runs = live(module)
    inside = module.named_children()
    if runs is not module:
        inside = [(key, part) for key, part in module.named_modules() if part is runs]
    for key, child in inside:
        yield from _live_parts(child, f"{name}.{key}" if name else key, module, seen)


def _with_head(part: nn.Module, path: dict[nn.Module, tuple[str, nn.Module | None]]) -> nn.Module:
    """The outermost of the models around a part that are it with a head, as transformers marks them."""
    parent = path[part][1]
    while parent is not None and getattr(parent, getattr(parent, "base_model_prefix", None) or "", None) is part:
        part, parent = parent, path[parent][1]
    return part
