"""Overhears how a model encodes its pictures.

A record of what a selector may want to know travels with the encoded pictures themselves: it is an attribute of the
output of `get_image_features` and `get_video_features`, and of the tensors in it. So it is found however the output
reaches the language model: from the model's forward, from `generate`, from a cache of features, from another thread.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vltok.edits import MethodWrapper
from vltok.errors import UnsupportedInputError
from vltok.visual import AttentionRequest

KINDS = ("image", "video")
ENCODERS = {kind: f"get_{kind}_features" for kind in KINDS}  # what encodes them, in every model
KEYWORD = "vltok_call"  # by which the state of a call travels; no name that transformers gives a meaning
PIXELS = "pixel_values"  # how the arguments begin that hold pictures
RECORD = "vltok_record"
REMEMBERED = 64  # encodings whose rows are known again when callers merge them into embeddings themselves
REMEMBERED_PROMPTS = 4096  # prompts about the same encoded pictures, of which it is known what was decided on them


@dataclass(frozen=True)
class Wanted:
    """What a selector wants to know of the vision tower.

    Attributes:
        attention: Which attention, or None.
        keys: Whether it wants the keys of that layer, too.
        features: Whether it wants what the tower says of its patches.
        merges: Whether gradients are to flow through keys and features.
    """

    attention: AttentionRequest | None = None
    keys: bool = False
    features: bool = False
    merges: bool = False

    @property
    def names(self) -> list[str]:
        """What is read for it, by name."""
        found = {"attention": self.attention is not None, "keys": self.keys, "features": self.features}
        return [name for name, is_wanted in found.items() if is_wanted]


@dataclass
class Encoding:
    """What is known of pictures that were encoded together.

    Attributes:
        kind: "image" or "video".
        lengths: Visual tokens of each entry of the features.
        keys: Numbers made from the pixels, (n,), int64: of each entry, or of each crop where entries hold several.
        spans: Visual tokens that each of these numbers is about.
        pixels_shape: Shape of the pixels.
        arguments: The other arguments they were encoded with.
        wanted: What was asked for while they were encoded.
        read: What was read in the tower, each time that it ran, by name: "attention" (R, S), float32; "keys"
            (R, S, H, d); "features" (R, S, C), or in their place what the projector reads, "inputs" (R, N, C).
        seen: Which of these tokens the model takes, (V of `whole`,), bool, where it leaves some out itself.
        whole: The encoding with all of them.
        rows: A number made from each visual token, (V,), int64, to know them again in merged embeddings.
        notes: What the family works out once.
        decisions: What was decided on prompts about these pictures, for `generate` without a cache.
    """

    kind: str
    arguments: dict[str, Any]
    wanted: Wanted | None = None
    pixels_shape: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)
    keys: torch.Tensor | None = None
    spans: list[int] = field(default_factory=list)
    read: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    seen: torch.Tensor | None = None
    whole: Encoding | None = None
    rows: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    decisions: dict[Any, Any] = field(default_factory=dict)

    def of_tower(self, name: str) -> torch.Tensor:
        """What was read in the tower, (R, S, ...), which runs once on pictures that are encoded together.

        Raises:
            UnsupportedInputError: If it ran more often.
        """
        runs = self.read.get(name, ())
        if len(runs) != 1:
            raise UnsupportedInputError(
                f"the vision tower ran {len(runs)} times on images that were encoded together, so its {name} can't "
                "be matched with their tokens; choose a method that needs no such thing of the vision tower"
            )
        return runs[0]

    def decide(self, prompt: Any, decision: Any) -> None:
        """Remember what was decided on a prompt about these pictures; what was decided first is forgotten first."""
        self.decisions[prompt] = decision
        while len(self.decisions) > REMEMBERED_PROMPTS:
            self.decisions.pop(next(iter(self.decisions)), None)

    def note(self, name: str, values: torch.Tensor) -> None:
        """Keep what the tower shows, (R, S, ...)."""
        self.read.setdefault(name, []).append(values)

    @cached_property
    def grids(self) -> list[list[int]] | None:
        """Frames, rows and columns of the patches of each picture, where these were passed in."""
        for name, value in self.arguments.items():
            if name.endswith("grid_thw") and isinstance(value, torch.Tensor):
                return value.tolist()
            if name.endswith("_position_ids") and isinstance(value, torch.Tensor) and value.dim() == 3:
                # Column and row of every patch, (images or frames, patches, 2), -1 for padding.
                frames = self.arguments.get("num_frames_per_video")
                frames = [1] * len(value) if frames is None else frames.tolist()
                first = [sum(frames[:number]) for number in range(len(frames))]
                sides = (value.amax(1) + 1)[first].tolist()
                return [[count, rows, columns] for count, (columns, rows) in zip(frames, sides, strict=True)]
        return None


def pixel_keys(pixels: torch.Tensor) -> torch.Tensor:
    """Hash the values of each row, (R, ...) -> (R,), int64: the same for equal values in any batch, on any device.

    Zeros at the end add nothing, so padding doesn't count.
    """
    flat = pixels.detach().flatten(1)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.contiguous().view(kinds[flat.element_size()]).long()
    weights = (torch.arange(bits.shape[1], device=bits.device) * 2 + 1) * 0x2545F4914F6CDD1D  # odd: no element is lost
    return (bits * weights).sum(1)


def row_keys(tokens: torch.Tensor) -> torch.Tensor:
    """Hash the first channels of each token, (..., D) -> (...), int64."""
    return pixel_keys(tokens.detach()[..., :8].flatten(0, -2)).view(tokens.shape[:-1])


@dataclass(frozen=True)
class Found:
    """An encoded entry, met again among other tokens of a row, at these places."""

    encoding: Encoding
    entry: int
    places: list[int]

    @property
    def length(self) -> int:
        """Its visual tokens."""
        return self.encoding.lengths[self.entry]


class Tape(threading.local):
    """What the calling thread is doing: the encoding under way, and the prompt that waits for it."""

    def __init__(self) -> None:
        self.encoding: Encoding | None = None
        self.waiting: weakref.ref | None = None
        self.answer: dict[Any, dict[Any, Any]] | None = None  # what was decided on pictures, while `generate` runs

    @contextmanager
    def nothing_encoded(self) -> Iterator[None]:
        """Run a part of the model for other ends than the encoding under way."""
        outer, self.encoding = self.encoding, None
        try:
            yield
        finally:
            self.encoding = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        return Tape()

    def __reduce__(self) -> tuple[type[Tape], tuple]:
        return Tape, ()


class Answering(MethodWrapper):
    """Stands in the place of `generate` where that encodes images with every word: what was decided on them stays.

    Args:
        tape: The engine's.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer, self.tape.answer = self.tape.answer, {}
        try:
            return call(*args, **kwargs)
        finally:
            self.tape.answer = outer


class Recent:
    """The encodings of late, by content: embeddings that callers merged themselves are known again by their rows."""

    def __init__(self) -> None:
        self._encodings: deque[Encoding] = deque(maxlen=REMEMBERED)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recent:
        return Recent()

    def __reduce__(self) -> tuple[type[Recent], tuple]:
        return Recent, ()

    def add(self, encoding: Encoding) -> None:
        """Remember an encoding."""
        self._encodings.append(encoding)

    def find(self, tokens: torch.Tensor, gap: int = 0) -> list[list[Found]]:
        """Find encoded entries in tokens (B, T, D), for each row in order, with at most `gap` others between theirs."""
        begins: dict[int, list[tuple[Encoding, int, list[int]]]] = {}
        for encoding in list(self._encodings)[::-1]:
            for entry, rows in enumerate(encoding.rows.cpu().split(encoding.lengths)):
                if len(rows):
                    begins.setdefault(int(rows[0]), []).append((encoding, entry, rows.tolist()))
        found: list[list[Found]] = [[] for _ in tokens]
        for row, keys in enumerate(row_keys(tokens).tolist() if begins else ()):
            position = 0
            while position < len(keys):
                for encoding, entry, rows in begins.get(keys[position], ()):
                    if places := _places(rows, keys, position, gap):
                        found[row].append(Found(encoding, entry, places))
                        position = places[-1]
                        break
                position += 1
        return found

    def knows_any(self, tokens: torch.Tensor) -> bool:
        """Whether one of these tokens, (V, D), is of an encoding."""
        known = {key for encoding in list(self._encodings) for key in encoding.rows.tolist()}
        return not known.isdisjoint(row_keys(tokens).tolist())


def _places(rows: list[int], keys: list[int], start: int, gap: int) -> list[int]:
    """Where these rows stand among keys from `start` on, with at most `gap` others between two; empty if they don't."""
    places = [start]
    for row in rows[1:]:
        stop = min(len(keys), places[-1] + gap + 2)
        place = next((each for each in range(places[-1] + 1, stop) if keys[each] == row), None)
        if place is None:
            return []
        places.append(place)
    return places


class Encoder(MethodWrapper):
    """Stands in the place of a model's encoder of pictures, does what that does, and leaves a record with the result.

    Args:
        kind: What it encodes, "image" or "video".
        tape: The engine's.
        recent: The engine's.
        begin: Called before: it says what is wanted, and sees to it that the tower is watched.
        describe: Called after, with the record and the pixels: it gives the keys.
    """

    def __init__(
        self,
        kind: str,
        tape: Tape,
        recent: Recent,
        begin: Callable[[], Wanted | None],
        describe: Callable[[Encoding, torch.Tensor], tuple[torch.Tensor, list[int]]],
    ) -> None:
        self.kind = kind
        self.tape = tape
        self.recent = recent
        self._begin = begin
        self._describe = describe

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEYWORD, None)  # some models hand it to their encoders
        arguments = dict(self.__signature__.bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        given = [name for name, value in arguments.items() if name.startswith(PIXELS) and value is not None]
        pixels = arguments.pop(given[0]) if given else None
        encoding = Encoding(self.kind, arguments, self._begin())
        outer, self.tape.encoding = self.tape.encoding, encoding
        try:
            output = call(*args, **kwargs)
        finally:
            self.tape.encoding = outer
        encoding = self._finish(encoding, pixels, output)
        if encoding is not None:
            encoding.kind = self.kind
        prompt = None if self.tape.waiting is None else self.tape.waiting()
        if prompt is not None:
            prompt.meet(self.kind, encoding)
        return output

    @torch.no_grad()
    def _finish(self, encoding: Encoding, pixels: Any, output: Any) -> Encoding | None:
        known = record_of(output)
        if known is not None:  # features computed before, or by the other encoder, to which this one handed them
            return known
        entries = entries_of(output)
        if entries is None or not isinstance(pixels, torch.Tensor):
            return None
        encoding.pixels_shape = pixels.shape
        encoding.lengths = [len(entry) for entry in entries]
        encoding.keys, encoding.spans = self._describe(encoding, pixels)
        encoding.rows = torch.cat([row_keys(entry) for entry in entries]) if entries else torch.zeros(0).long()
        if self.tape.answer is not None:
            same = self.kind, *encoding.keys.tolist()
            encoding.decisions = self.tape.answer.setdefault(same, encoding.decisions)
        pooled = getattr(output, "pooler_output", output)
        for each in (output, *(pooled if isinstance(pooled, list | tuple) else ())):
            if not isinstance(each, list | tuple):
                setattr(each, RECORD, encoding)
        self.recent.add(encoding)
        return encoding


def entries_of(output: Any) -> list[torch.Tensor] | None:
    """The entries of encoded pictures, (N, D) each, or None if there are none to be seen.

    Args:
        output: An output of transformers with them in `pooler_output`; or they alone, as code outside transformers
            returns them: (pictures, N, D), (N, D), or a list of (N, D).
    """
    pooled = getattr(output, "pooler_output", None)
    if pooled is None and isinstance(output, torch.Tensor):
        pooled = output.unsqueeze(0) if output.dim() == 2 else output
    if pooled is None and isinstance(output, list | tuple):
        pooled = output if all(isinstance(each, torch.Tensor) and each.dim() == 2 for each in output) else None
    if pooled is None:
        return None
    return [entry.flatten(0, -2) for entry in pooled]


def record_of(output: Any) -> Encoding | None:
    """The record that encoded pictures carry: on the output, or on its first entry where the output was made anew."""
    record = getattr(output, RECORD, None)
    pooled = getattr(output, "pooler_output", output)
    if record is None and isinstance(pooled, list | tuple) and len(pooled):
        record = getattr(pooled[0], RECORD, None)
    return record
