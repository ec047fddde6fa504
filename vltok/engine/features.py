"""Overhears how a model encodes its pictures, and says which entries of the features make up which picture.

A record of what a selector may want to know travels with the encoded pictures themselves: it is an attribute of the
output of `get_image_features`, and of the tensors in it. So it is found however the output reaches the language model:
from the model's own forward, from `generate`, from a cache of features, from another thread.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch

from vltok.edits import MethodWrapper
from vltok.views import AttentionRequest

KEYWORD = "vltok_call"  # by which the state of a call travels; no name that transformers gives a meaning
RECORD = "vltok_record"
REMEMBERED = 64  # encodings whose rows are known again when callers merge them into embeddings themselves


@dataclass
class Encoding:
    """What is known of pictures that were encoded together.

    Attributes:
        lengths: Visual tokens of each entry of the features.
        keys: A number made from the pixels of each entry, (entries,), int64.
        pixels_shape: Shape of the pixels.
        arguments: The other arguments they were encoded with.
        request: Which attention was asked for while they were encoded.
        attention: The attention as read in the tower, (R, S) or (patches,), float32.
        rows: A number made from each visual token, (V,), int64, to know them again in merged embeddings.
        notes: What the family works out once.
        decisions: What decoder rules decided on prompts about these pictures, for `generate` without a cache.
    """

    arguments: dict[str, Any]
    request: AttentionRequest | None = None
    pixels_shape: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)
    keys: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    decisions: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One image as the language model sees it.

    Attributes:
        row: The prompt it belongs to, repetitions for beams not counted.
        start: Its first token among all visual tokens of these prompts.
        length: Its visual tokens, N.
        encoding: What is known of it, or None.
        entries: The entries of its encoding that it is made of.
    """

    row: int
    start: int
    length: int
    encoding: Encoding | None
    entries: range


def pixel_keys(pixels: torch.Tensor) -> torch.Tensor:
    """Hash the values of each row, (R, ...) -> (R,), int64: the same for equal values in any batch, on any device.

    Zeros at the end add nothing, so padding doesn't count.
    """
    flat = pixels.detach().reshape(pixels.shape[0], -1)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.contiguous().view(kinds[flat.element_size()]).long()
    weights = (torch.arange(bits.shape[1], device=bits.device) * 2 + 1) * 0x2545F4914F6CDD1D  # odd: no element is lost
    return (bits * weights).sum(1)


def row_keys(tokens: torch.Tensor) -> torch.Tensor:
    """Hash the first channels of each token, (..., D) -> (...), int64."""
    return pixel_keys(tokens.detach()[..., :8].flatten(0, -2)).view(tokens.shape[:-1])


@dataclass(frozen=True)
class Found:
    """An encoded entry, met again among other tokens of a row."""

    encoding: Encoding
    entry: int
    position: int

    @property
    def length(self) -> int:
        """Its visual tokens."""
        return self.encoding.lengths[self.entry]


class Tape(threading.local):
    """What the calling thread is doing: the encoding under way, and the forward that waits for it."""

    def __init__(self) -> None:
        self.encoding: Encoding | None = None
        self.waiting: weakref.ref | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        return Tape()

    def __reduce__(self) -> tuple[type[Tape], tuple]:
        return Tape, ()


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

    def find(self, tokens: torch.Tensor) -> list[list[Found]]:
        """Find encoded entries in tokens (B, T, D), for each row in order."""
        begins: dict[int, list[tuple[Encoding, int, list[int]]]] = {}
        for encoding in list(self._encodings)[::-1]:
            for entry, rows in enumerate(encoding.rows.split(encoding.lengths)):
                if len(rows):
                    begins.setdefault(int(rows[0]), []).append((encoding, entry, rows.tolist()))
        found: list[list[Found]] = [[] for _ in tokens]
        for row, keys in enumerate(row_keys(tokens).tolist() if begins else ()):
            position = 0
            while position < len(keys):
                known = begins.get(keys[position], ())
                hit = next((each for each in known if keys[position : position + len(each[2])] == each[2]), None)
                if hit is not None:
                    found[row].append(Found(hit[0], hit[1], position))
                position += 1 if hit is None else len(hit[2])
        return found

    def knows_any(self, tokens: torch.Tensor) -> bool:
        """Whether one of these tokens, (V, D), is of an encoding."""
        known = {key for encoding in list(self._encodings) for key in encoding.rows.tolist()}
        return not known.isdisjoint(row_keys(tokens).tolist())


class Encoder(MethodWrapper):
    """Stands in the place of a model's `get_image_features`, does what that does, and leaves a record with the result.

    Args:
        tape: The engine's.
        recent: The engine's.
        begin: Called before: it says which attention is wanted, and sees to it that the tower is watched.
        describe: Called after, with the record and the pixels: it gives each entry its key.
    """

    def __init__(
        self,
        tape: Tape,
        recent: Recent,
        begin: Callable[[], AttentionRequest | None],
        describe: Callable[[Encoding, torch.Tensor], torch.Tensor],
    ) -> None:
        self.tape = tape
        self.recent = recent
        self._begin = begin
        self._describe = describe

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEYWORD, None)  # some models hand it to their encoders
        signature = self.__signature__
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        pixels = arguments.pop(next(iter(signature.parameters)), None)
        encoding = Encoding(arguments, self._begin())
        outer, self.tape.encoding = self.tape.encoding, encoding
        try:
            output = call(*args, **kwargs)
        finally:
            self.tape.encoding = outer
        encoding = self._finish(encoding, pixels, output)
        prompt = None if self.tape.waiting is None else self.tape.waiting()
        if prompt is not None:
            prompt.encoding = encoding
        return output

    @torch.no_grad()
    def _finish(self, encoding: Encoding, pixels: Any, output: Any) -> Encoding | None:
        known = getattr(output, RECORD, None)
        if known is not None:  # features computed before, which somebody's method gave back
            return known
        entries = entries_of(output)
        if entries is None or not isinstance(pixels, torch.Tensor):
            return None
        encoding.pixels_shape = pixels.shape
        encoding.lengths = [len(entry) for entry in entries]
        encoding.keys = self._describe(encoding, pixels).cpu()
        encoding.rows = torch.cat([row_keys(entry) for entry in entries]) if entries else torch.zeros(0).long()
        setattr(output, RECORD, encoding)
        if isinstance(output.pooler_output, list | tuple):
            for entry in output.pooler_output:
                setattr(entry, RECORD, encoding)
        self.recent.add(encoding)
        return encoding


def entries_of(output: Any) -> list[torch.Tensor] | None:
    """The entries of encoded pictures, (N, D) each, or None if there are none to be seen."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        return None
    return [entry.flatten(0, -2) for entry in pooled]


def record_of(output: Any) -> Encoding | None:
    """The record that encoded pictures carry: on the output, or on its first entry where the output was made anew."""
    record = getattr(output, RECORD, None)
    pooled = getattr(output, "pooler_output", None)
    if record is None and isinstance(pooled, list | tuple) and len(pooled):
        record = getattr(pooled[0], RECORD, None)
    return record


def find_pictures(
    unit: str, encoding: Encoding | None, lengths: Sequence[int], visual: torch.Tensor
) -> list[Picture] | None:
    """Say which entries make up which picture.

    Args:
        unit: What a picture is: an "entry" of the features, or an unbroken "run" of placeholders, of whole entries.
        encoding: The record of the entries, if there is one.
        lengths: Visual tokens of each entry.
        visual: Where the placeholders are, (B, T), bool, on the CPU, without repeated prompts.

    Returns:
        The pictures, in the order of the prompts, or None if the entries don't fit the placeholders.
    """
    begins = {begin: entry for entry, begin in reversed(list(enumerate(accumulate(lengths, initial=0))))}
    room = visual.sum(1).tolist()
    if unit == "entry":
        pieces = [length for length in lengths if length]
    else:
        pieces = [len(list(run)) for row in visual.tolist() for is_visual, run in groupby(row) if is_visual]
    if sum(room) != sum(lengths) or sum(pieces) != sum(room):
        return None
    pictures: list[Picture] = []
    row = start = 0
    for length in pieces:
        while room[row] == 0:
            row += 1
        stop = start + length
        if length > room[row] or start not in begins or stop not in begins:
            return None
        pictures.append(Picture(row, start, length, encoding, range(begins[start], begins[stop])))
        room[row] -= length
        start = stop
    return pictures
