"""What a server is told about pruning, and what a request may ask for. Knows no server.

The settings stand in the field `vltok_pruning` of the model's config, where every process of a server finds them:

    {"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.5}

A request may have a budget of its own, up to the largest one that is allowed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vltok.errors import CheckpointError, UnsupportedInputError, UnsupportedModelError
from vltok.method import Method
from vltok.methods import DecoderRule, Selector
from vltok.methods.condensing.condenser import Condenser
from vltok.methods.pruning.regions import check_grid
from vltok.tokens import Grid3
from vltok.version import __version__
from vltok.visual import DecoderState

FIELD = "vltok_pruning"  # of a model's config; `vltok` is the note of a checkpoint that vltok saved
SAVED = "vltok"
CONDENSER = "vltok_condenser"  # the folder of a condenser, see `vltok.serving.condenser`
LARGEST = {"max_keep_ratio": "keep_ratio", "max_num_keep": "num_keep"}
# What a request may give the processor (`mm_processor_kwargs`).
REQUEST = {"visual_keep_ratio": "keep_ratio", "visual_num_keep": "num_keep"}

_INSIDE = (
    "what a server encodes is cached by image and shared by all questions, and its KV cache has no place for tokens "
    "that leave inside the decoder; so methods that read the question, and rules in the decoder, can't be served"
)
_SWAPS = "it puts modules of its own into the model, and a server builds and loads the model itself"


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens a server keeps.

    Attributes:
        selector: What picks them, with the budget of requests that ask for none.
        largest: The same with the largest budget that a request may ask for.
    """

    selector: Selector
    largest: Selector

    @staticmethod
    def of_field(field: object) -> Pruning:
        """Read the field of a config.

        Args:
            field: The method as text, such as "divprune,keep_ratio=0.25"; or its settings, with "method" for its name,
                and "max_keep_ratio" or "max_num_keep" besides.

        Raises:
            CheckpointError: If the method or a setting is unknown.
            UnsupportedModelError: If the method can't be served.
            ValueError: If a setting is out of range.
        """
        if isinstance(field, str):
            method, most = Method.from_text(field), {}
        elif isinstance(field, Mapping) and isinstance(field.get("method"), str):
            most = {LARGEST[name]: value for name, value in field.items() if name in LARGEST}
            settings = {name: value for name, value in field.items() if name not in LARGEST}
            method = Method.from_settings(settings.pop("method"), settings)
        else:
            raise CheckpointError(
                f'{FIELD} must be a method as text, or its settings such as {{"method": "divprune", "keep_ratio": '
                f"0.25}}, got {field!r}"
            )
        selector = check_servable(method)
        largest = _with_budget(selector, most) if most else selector
        for name in most:
            own = getattr(selector, name)
            if own is not None and own > most[name]:
                raise ValueError(f"max_{name}={most[name]} is below the server's own {name}={own}; make it as large")
        return Pruning(selector, largest)

    @staticmethod
    def of_config(config: Any) -> Pruning | None:
        """Read a model's config; None if nothing is asked for.

        Raises:
            CheckpointError: As `of_field`, or if the checkpoint was saved with a method of vltok on the model.
            UnsupportedModelError: If the method can't be served.
        """
        field = getattr(config, FIELD, None)
        if field is None:
            return None
        if getattr(config, SAVED, None) is not None:
            raise CheckpointError(
                f"this checkpoint was saved with a vltok method on the model (field {SAVED!r} of its config), whose "
                "weights a server doesn't know; load it with vltok.from_pretrained, remove the method, and save it "
                "again"
            )
        return Pruning.of_field(field)

    def of_request(self, options: Mapping[str, Any]) -> Selector:
        """The selector for a request, with the budget that it asks for.

        Args:
            options: What it gives the processor (`mm_processor_kwargs`); "visual_keep_ratio" or "visual_num_keep" is
                its budget.

        Raises:
            TypeError: If that is not a number of the right kind.
            ValueError: If it is out of range, or both are given.
        """
        asked = {REQUEST[name]: value for name, value in options.items() if name in REQUEST and value is not None}
        if len(asked) > 1:
            raise ValueError(f"a request takes one of {' and '.join(REQUEST)}, got {dict(options)}")
        return _with_budget(self.selector, asked) if asked else self.selector

    def count(self, selector: Selector, num_tokens: int, grid: Grid3 | None, kind: str, tiles: int = 1) -> int:
        """How many visual tokens of an image or video are kept for a request.

        Args:
            selector: That of the request.
            num_tokens: Visual tokens of the image or video, N.
            grid: Frames, rows and columns of these, or None.
            kind: "image" or "video".
            tiles: Tiles of an image that are told apart.

        Raises:
            UnsupportedInputError: If the selector needs a grid, and the tokens form none.
            ValueError: If it is more than a request may ask for.
        """
        count, most = (
            sum(
                _count(each, end - begin, own, kind)
                for begin, end, own in budget_parts(each, num_tokens, grid, kind, tiles)
            )
            for each in (selector, self.largest)
        )
        if count > most:
            raise ValueError(
                f"the request asks for {count} of {num_tokens} visual tokens, and this server was started for at most "
                f"{most}; ask for fewer, or start it with max_keep_ratio or max_num_keep in {FIELD}"
            )
        return count

    def most(self, num_tokens: int, kind: str) -> int:
        """The most visual tokens of an image or video that a request may ask for: all where that hangs on its grid.

        Args:
            num_tokens: Visual tokens of the largest image or video, N.
            kind: "image" or "video".
        """
        largest = self.largest
        if type(largest).budget is not Selector.budget or (kind == "video" and largest.per == "frame"):
            return num_tokens
        return largest.budget(num_tokens, None, kind)


def _count(selector: Selector, length: int, grid: Grid3 | None, kind: str) -> int:
    """How many tokens are kept of some that share a budget."""
    count = selector.budget(length, grid, kind)
    if selector.regions is not None and count < length:
        check_grid(grid)
    return count


def budget_parts(
    selector: Selector, length: int, grid: Grid3 | None, kind: str, tiles: int = 1
) -> Iterator[tuple[int, int, Grid3 | None]]:
    """Begin, end and grid of the tokens of an image or video that share a budget: all, or those of a frame or tile."""
    if selector.per == "frame" and kind == "video" and grid is not None:
        frames, rows, columns = grid
        for frame in range(frames):
            begin = frame * rows * columns
            yield begin, length if frame + 1 == frames else begin + rows * columns, (1, rows, columns)
    elif selector.per == "tile" and kind == "image" and tiles > 1:
        own = length // tiles
        for begin in range(0, length, own):
            yield begin, begin + own, square(own)
    else:
        yield 0, length, grid


def square(num_tokens: int) -> Grid3 | None:
    """The grid of so many tokens, if they form a square."""
    side = math.isqrt(num_tokens)
    return (1, side, side) if side**2 == num_tokens else None


def to_numbers(selector: Selector) -> list[float]:
    """The budget of a request as it travels with its images: keep_ratio and num_keep, NaN for the one not given."""
    return [math.nan if value is None else float(value) for value in (selector.keep_ratio, selector.num_keep)]


def of_numbers(selector: Selector, numbers: Sequence[float]) -> Selector:
    """The selector with the budget that `to_numbers` wrote."""
    keep_ratio, num_keep = numbers
    return _with_budget(selector, {"keep_ratio": keep_ratio} if math.isnan(num_keep) else {"num_keep": int(num_keep)})


def reads_of_tower(selector: Selector) -> set[str]:
    """What a selector looks at in the vision tower: "attention", "keys", "features"."""
    asks = any(selector.attention_request(has_cls) for has_cls in (False, True))
    return {"keys", "features"} & {*selector.needs} | ({"attention"} if asks else set())


def identity(selector: Selector) -> str:
    """What tells cached images apart that were pruned in different ways."""
    return json.dumps({"vltok": __version__, **selector.to_dict()}, sort_keys=True)


def check_unasked(options: Mapping[str, Any]) -> None:
    """Raise ValueError if a request asks a server that prunes nothing for a budget."""
    asked = sorted({*REQUEST} & {*options})
    if asked:
        raise ValueError(f"the request gives {', '.join(asked)}, and this server prunes nothing; start it with {FIELD}")


def without_budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a request gives the processor, without what is meant for vltok."""
    return {name: value for name, value in options.items() if name not in REQUEST}


def check_servable(method: Method) -> Selector:
    """Return the method if a server can carry it out.

    Raises:
        UnsupportedModelError: If it can't.
    """
    name = method.name or type(method).__name__
    if not isinstance(method, Selector):
        reason = _INSIDE if isinstance(method, DecoderRule) else _SWAPS
        saved = ", or give the folder that vltok.save() wrote of it" if isinstance(method, Condenser) else ""
        raise UnsupportedModelError(f"{name} can't be served: {reason}; choose a selector, such as divprune{saved}")
    if {"text", "clip"} & {*method.needs}:
        raise UnsupportedModelError(
            f"{name} reads the question and can't be served: {_INSIDE}; leave the question out where the method has a "
            "setting for that, or choose another method"
        )
    if _drops_inside(method):
        raise UnsupportedModelError(
            f"{name} drops tokens inside the decoder and can't be served so: {_INSIDE}; give relevance=False"
        )
    return method


def _drops_inside(method: Method) -> bool:
    """Whether it asks for decoder layers: it is put on a model that only listens."""
    listener = _Listener()
    method.attach(listener, None, None)
    return listener.has_rule


class _Listener:
    """Stands for a model, and notes what a method asks for."""

    has_rule = False

    def on_visual_tokens(self, edits: object, run: object, selector: object) -> None:
        """Any selector is welcome."""

    def on_decoder_layers(self, edits: object, run: object, rule: DecoderState) -> None:
        self.has_rule = True


def _with_budget(selector: Selector, budget: dict[str, Any]) -> Selector:
    """The same selector with this keep_ratio or num_keep, and not the other."""
    if len(budget) > 1:
        raise ValueError(f"one of keep_ratio and num_keep says how many visual tokens are kept, got {budget}")
    return replace(selector, **{"keep_ratio": None, "num_keep": None, **budget})


def check_positions(selector: Selector, has_axes: bool) -> None:
    """Raise UnsupportedInputError if a model with positions on several axes is to count them anew."""
    if has_axes and selector.positions != "keep":
        raise UnsupportedInputError(
            f'positions="{selector.positions}" counts tokens on one axis, and this model has several; use "keep"'
        )
