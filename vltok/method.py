"""Method, the base of everything that can be applied to a model, and how methods are found by name."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from vltok.edits import Edits
from vltok.errors import CheckpointError
from vltok.run import Run

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of knobs with one verb, `attach`.

    A method holds no weights and no state: weights live in modules it adds to the model, the state of a call in the
    `Run` and in the family's engine. One instance can be applied to any number of models.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    training_free: ClassVar[bool] = True
    fixed: ClassVar[tuple[str, ...] | None] = None
    """Settings that `handle.using` can't change, as the model was made to fit them; None stands for all."""

    def per_call(self) -> tuple[str, ...]:
        """Names of the settings that `handle.using` may change."""
        return () if self.fixed is None else tuple(each.name for each in fields(self) if each.name not in self.fixed)

    def with_settings(self, **settings: Any) -> Method:
        """Return this method with other settings for the calls of a block, all of them among `per_call()`."""
        return replace(self, **settings)

    def settled(self, view: Any) -> Method:
        """Return these settings with all that they leave to the model filled in, which is what gets applied and saved.

        A saved folder then means the same on any model, however that one would fill them in. Nothing is left open by
        default.
        """
        return self

    def attach(self, view: Any, edits: Edits, run: Run) -> None:
        """Attach to a model seen through `view`, with every change in `edits` and every result in `run`."""
        raise NotImplementedError(f"{type(self).__name__} must define attach()")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data for a JSON file."""
        return {"method": self.name, "version": self.version, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], writer: str | None = "an unknown version") -> Method:
        """Build the method that `to_dict` described.

        Args:
            data: What `to_dict` returned, perhaps through JSON.
            writer: The vltok version that wrote it, named in errors; None if a person did.

        Raises:
            CheckpointError: If the method, its version or one of the fields is not known here.
        """
        settings = dict(data)
        name = settings.pop("method", None)
        source = "" if writer is None else f" (written by vltok {writer})"
        known_methods = methods_by_name()
        if not isinstance(name, str) or name not in known_methods:
            raise CheckpointError(
                f"unknown method {name!r}{source}{_nearest([name], known_methods)} {', '.join(sorted(known_methods))}"
            )
        cls = known_methods[name]
        version = settings.pop("version", None)
        if version != cls.version:
            raise CheckpointError(
                f"{name} was written in format {version!r} by vltok {writer}; this vltok reads format {cls.version}"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise CheckpointError(
                f"unknown field {', '.join(map(repr, unknown))} of {name}{source}{_nearest(unknown, known)} "
                f"{', '.join(sorted(known))}"
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})

    @staticmethod
    def from_text(text: str) -> Method:
        """Read a method as command lines name it: "todre,keep_ratio=0.1,stages=(1,)", or the JSON of `to_dict`.

        Raises:
            CheckpointError: If the method or one of its settings is unknown.
            ValueError: If the text is neither, or a setting is out of range.
        """
        if text.lstrip().startswith("{"):
            return Method.from_dict(json.loads(text), writer=None)
        name, *settings = re.split(r",(?![^(\[]*[)\]])", text)  # not at commas inside brackets
        name, given = name.strip(), {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key.strip() in given:
                wrong = f"{key.strip()} twice" if equals else repr(setting)
                raise ValueError(f"a setting of a method is written once, as key=value, got {wrong} in {text!r}")
            given[key.strip()] = _value(value.strip())
        try:
            return Method.from_settings(name, given)
        except TypeError as error:
            raise ValueError(f"{text!r}: {error}") from error

    @staticmethod
    def from_settings(name: str, settings: Mapping[str, Any]) -> Method:
        """Build the method that a person names, with these settings; errors are those of `from_dict` and its own."""
        version = getattr(methods_by_name().get(name), "version", None)
        return Method.from_dict({"method": name, "version": version, **settings}, writer=None)


def methods_by_name() -> dict[str, type[Method]]:
    """The methods that saved files and texts may name, those of vltok and those that were registered."""
    import_module("vltok.methods")  # each file of it registers its own
    return _METHODS


def _nearest(given: Iterable[object], known: Iterable[str]) -> str:
    """The words before a list of what is known; they ask whether something on it was meant that is spelled alike."""
    near = [difflib.get_close_matches(str(each).lower(), list(known), n=1) for each in given]
    meant = ", ".join(repr(name) for names in near for name in names)
    return f"; did you mean {meant}? This vltok knows" if meant else "; this vltok knows"


def _value(text: str) -> Any:
    """Read a number, tuple, True, False or None as Python writes it; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`, the word saved files use for it.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(cls: M) -> M:
        known = methods_by_name()
        if name in known:
            raise ValueError(f"a method named {name!r} is already registered: {known[name].__name__}")
        cls.name = name
        known[name] = cls
        return cls

    return decorate
