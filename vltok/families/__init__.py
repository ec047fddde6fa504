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
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from torch import nn

from vltok.checks import check_choice, check_integer
from vltok.engine.parts import live
from vltok.errors import UnsupportedModelError
from vltok.families import towers, vlm
from vltok.families.support import ModelSupport, TowerSupport
from vltok.families.table import Entry

if TYPE_CHECKING:
    from vltok.families.towers.view import TowerView
    from vltok.families.vlm.view import VlmView

Kind = Literal["vlm", "tower"]
Unit = Literal["entry", "run", "row"]
_PACKAGES = {"vlm": vlm, "tower": towers}
_TABLES = {"vlm": vlm.VLMS, "tower": towers.TOWERS}


class Supported(TypedDict):
    """Families by name, of each kind."""

    vlm: dict[str, ModelSupport]
    tower: dict[str, TowerSupport]


def supported_models() -> Supported:
    """What methods can be put on: for each kind, "vlm" and "tower", its families by name, with what is known of each.

    `python -m vltok families` prints it. Families of your own are among them, see `register_family`.
    """
    told = {"vlm": ModelSupport.of, "tower": TowerSupport.of}
    return {
        kind: {name: told[kind](_family(_PACKAGES[kind], entry)) for name, entry in table.items()}
        for kind, table in _TABLES.items()
    }


def refusals() -> dict[str, str]:
    """Models of transformers that take images and can't be handled: what they are called, and why."""
    return dict(vlm.REFUSED.values())


def register_family(
    kind: Kind,
    name: str,
    defined_in: str | type[nn.Module],
    module: str | None = None,
    class_name: str | None = None,
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    unit: Unit | None = None,
    gap: int | None = None,
) -> None:
    """Make a family known that is not vltok's own. Nothing is imported until a model of it is met.

    A subclass of a supported model needs no registration: it is found by its bases.

    Args:
        kind: "vlm" for vision-language models, "tower" for vision towers.
        name: A word for the family, which saved files use.
        defined_in: The model's class, without the head; or the full name of the module, or package, that defines it.
        module: Full name of the module that describes the family. Without one, `defined_in` must be the class of a
            vision-language model that has a `get_image_features` and a decoder with `layers`, called language_model or
            text_model.
        class_name: The class in it, a subclass of `vltok.families.vlm.base.VlmFamily` or
            `vltok.families.towers.base.TowerFamily`.
        image_token_id: The id that stands for visual tokens of images, where the config doesn't say so. This and what
            follows are for families without a module.
        video_token_id: The same for videos.
        unit: What an image is, see `VlmFamily`; "entry" by default.
        gap: How many words may stand between tiles of one image, see `VlmFamily`; 0 by default.

    Raises:
        TypeError: If an id or the gap is no integer.
        ValueError: If the kind is unknown, the name is taken, or a value out of range; or if the family is described
            twice or not at all.
    """
    if kind not in _TABLES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _TABLES))}, got {kind!r}")
    if name == "generic" or any(name in table for table in _TABLES.values()):
        raise ValueError(f"a family named {name!r} is already registered; choose another name")
    facts = {"image_token_id": image_token_id, "video_token_id": video_token_id, "unit": unit, "gap": gap}
    facts = {fact: value for fact, value in facts.items() if value is not None}
    cls = defined_in if isinstance(defined_in, type) else None
    place = defined_in if cls is None else cls.__module__
    if (module is None) != (class_name is None) or (module is not None and facts):
        raise ValueError(
            "a family is described by a module and a class in it, or by facts such as unit; got "
            f"module={module!r}, class_name={class_name!r} and {facts}"
        )
    if module is None:
        if cls is None or kind != "vlm":
            raise ValueError(
                f"pass the class of a vision-language model, or say which module and which class in it describe the "
                f"family; got {defined_in!r} as a {kind!r} without a module"
            )
        module, class_name = "generic", "Generic"
        facts = {"name": name, "title": cls.__name__, "model_classes": (cls.__name__,), **_checked(**facts)}
    _TABLES[kind][name] = Entry(place, module, class_name, facts)


def _checked(
    image_token_id: int | None = None, video_token_id: int | None = None, unit: Unit = "entry", gap: int = 0
) -> dict[str, Any]:
    """Facts that somebody gave, as a generic family takes them."""
    check_choice("unit", unit, Unit)
    check_integer("gap", gap, least=0)
    return {"unit": unit, "gap": gap, "marks": checked_marks(image_token_id, video_token_id)}


def checked_marks(image_token_id: int | None, video_token_id: int | None) -> dict[str, int]:
    """The ids that stand for visual tokens, by kind, where they are given.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is negative.
    """
    marks = {"image": image_token_id, "video": video_token_id}
    marks = {kind: mark for kind, mark in marks.items() if mark is not None}
    for kind, mark in marks.items():
        check_integer(f"{kind}_token_id", mark, least=0)
    return marks


def view(model: nn.Module, processor: Any = None, text_tower: Any = None) -> VlmView | TowerView:
    """Find the family of a model, also inside a wrapper (PEFT, DDP, the class with the language-model head).

    Args:
        model: The model.
        processor: Its processor, for methods that change the placeholders.
        text_tower: A CLIP model and its tokenizer, for selectors that read the question in CLIP's space.

    Raises:
        TypeError: If `model` is not an nn.Module, or `text_tower` no such pair.
        UnsupportedModelError: If no part of it belongs to a known family, or several do, or this member can't be
            handled; or if the text tower is none of CLIP.
        ValueError: If the text tower's tokenizer is another model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply() takes a model (torch.nn.Module), got {type(model).__name__}")
    if found := _find(model, vlm, vlm.VLMS):
        from vltok.families.vlm.view import VlmView

        found.family.check(found.part)
        return VlmView(found.family, found.part, found.whole, processor, text_tower)
    if tower := find_tower(model):
        return tower
    raise unsupported(model)


def generic_view(model: nn.Module, marks: dict[str, int], processor: Any = None, text_tower: Any = None) -> VlmView:
    """A model of no known family, as its parts are called in most models of transformers.

    Args:
        model: The model, or what wraps it.
        marks: The ids that stand for visual tokens, by kind; what is not there is read from the config.
        processor: Its processor.
        text_tower: As for `view`.

    Raises:
        TypeError: If `model` is not an nn.Module.
        UnsupportedModelError: If no part of it has what a family needs, or no id is known.
    """
    from vltok.families.vlm.generic import Generic, decoder_of
    from vltok.families.vlm.view import VlmView

    if not isinstance(model, nn.Module):
        raise TypeError(f"apply() takes a model (torch.nn.Module), got {type(model).__name__}")
    if refused := _refusal(model):
        raise refused
    path = {part: (name, parent) for name, part, parent in _live_parts(model)}
    fitting = {decoder_of(part): part for part in path if Generic.fits(part)}  # a head may show parts as its own
    outer = [part for part in fitting.values() if not any(part in _inside(other) for other in fitting.values())]
    if len(outer) > 1:
        raise _several(model, "generic models", [(path[part][0], part) for part in outer])
    if not outer:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be pruned as a generic model: no part of it has both get_image_features() "
            "and a decoder with `layers`, called language_model or text_model, and a config of each; describe it with "
            "vltok.register_family()"
        )
    part = outer[0]
    family = Generic("generic", type(part).__name__, (type(part).__name__,), marks=marks)
    family.check(part)
    return VlmView(family, part, _with_head(part, path), processor, text_tower)


def find_tower(model: nn.Module) -> TowerView | None:
    """The vision tower in a model, or None if it has none of a known family."""
    if found := _find(model, towers, towers.TOWERS):
        from vltok.families.towers.view import TowerView

        return TowerView(found.family, found.part, model)
    return None


def unsupported(model: nn.Module) -> UnsupportedModelError:
    """What to say of a model that visual tokens don't pass through, as far as vltok can tell."""
    if refused := _refusal(model):
        return refused
    return UnsupportedModelError(
        f"{type(model).__name__} has no visual tokens that vltok can reach: no part of it belongs to one of the "
        f"{len(vlm.VLMS)} vision-language families that `python -m vltok families` lists; a vision tower or a text "
        f"model alone has no language model that visual tokens enter. Methods that change a vision tower itself know "
        f"the families {', '.join(towers.TOWERS)}, alone or in a vision-language model. For further models see "
        'vltok.register_family(), and family="generic" of vltok.apply()'
    )


def _refusal(model: nn.Module) -> UnsupportedModelError | None:
    """Why a model is refused whose visual tokens pass where nothing can be left out; None for others."""
    bases = {base for part in model.modules() for base in type(part).__mro__}
    for place, (title, reason) in vlm.REFUSED.items():
        if any(_is_defined_in(base, place) for base in bases):
            return UnsupportedModelError(f"{type(model).__name__} can't be pruned, as no {title} can: {reason}")
    return None


def _several(model: nn.Module, kind: str, parts: list[tuple[str, nn.Module]]) -> UnsupportedModelError:
    """What to say of a model that holds several of a kind side by side, each with its name."""
    names = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts)
    return UnsupportedModelError(
        f"{type(model).__name__} holds {len(parts)} {kind} side by side: {names}; vltok can't tell which one is "
        "meant, so pass that one, and call apply() once for each that is to be changed"
    )


def _inside(part: nn.Module) -> set[nn.Module]:
    return set(part.modules()) - {part}


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
        raise _several(model, kind, [(each.name, each.whole) for each in outer])
    return outer[0] if outer else None


def _belongs(one: _Found, other: _Found) -> bool:
    """Whether one part is inside another, or hangs on the head of the other, as a draft model may."""
    if one.part in set(other.part.modules()):
        return True
    return one.part in set(other.whole.modules()) and other.part not in set(one.whole.modules())


def _family_of(part: nn.Module, package: ModuleType, table: dict[str, Entry]) -> Any | None:
    for base in type(part).__mro__:
        for entry in table.values():
            if _is_defined_in(base, entry.defined_in):
                family = _family(package, entry)
                if base.__name__ in family.model_classes:
                    return family
    return None


def _family(package: ModuleType, entry: Entry) -> Any:
    """The family that an entry of a table stands for."""
    own = f"{package.__name__}.{entry.module}"
    file = import_module(own if "." not in entry.module and find_spec(own) else entry.module)
    return getattr(file, entry.class_name)(**entry.facts)


def _is_defined_in(cls: type, place: str) -> bool:
    return cls.__module__ == place or cls.__module__.startswith(f"{place}.")


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
