"""Says which encoded pictures stand where in a prompt.

Encoders give entries: of an image, of a tile or crop of one, or of all pictures of a row together. A prompt has
placeholders: an image is one entry, or an unbroken run of them, or several runs with words between them. Two tiles of
an image, and a video that comes as one entry, v its placeholders and w words between its frames:

    prompt     t i i i w i i i t v v w v v t
    pictures     [ run ] [ run ] [  entry  ]
                 [  an image   ] [ a video ]
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from vltok.engine.features import KINDS, Encoding, Found, Recent, entries_of, record_of, row_keys
from vltok.errors import UnsupportedInputError

if TYPE_CHECKING:
    from vltok.engine.prompt import Prompt

_GAP = 32  # words that may stand between two visual tokens of one entry, such as the times of frames
Joins = Callable[[list[int], int, int], bool]  # words of a row, where a run ends and where the next begins: one image?


@dataclass(frozen=True)
class Picture:
    """One image or video as the language model sees it.

    Attributes:
        kind: "image" or "video".
        row: The prompt it belongs to, repetitions for beams not counted.
        start: Its first token among all visual tokens of these prompts.
        length: Its visual tokens, N.
        encoding: What is known of it, or None.
        offset: Its first token among those of its encoding.
    """

    kind: str
    row: int
    start: int
    length: int
    encoding: Encoding | None
    offset: int

    @property
    def entries(self) -> range:
        """The entries of its encoding that it has tokens of."""
        return _between(self.encoding.lengths, self.offset, self.length)


def _between(lengths: Sequence[int], offset: int, length: int) -> range:
    """Which of the pieces of these lengths, one after another, reach into offset ... offset + length."""
    ends = list(accumulate(lengths))
    return range(bisect_right(ends, offset), bisect_left(ends, offset + length) + 1)


@dataclass
class Source:
    """Encoded pictures of one kind, as they came with a prompt.

    Attributes:
        kind: "image" or "video".
        encoding: Their record, if they have one.
        lengths: Visual tokens of each entry.
        found: Where entries without a record were met before, if they were.
    """

    kind: str
    encoding: Encoding | None
    lengths: list[int]
    found: list[Found] | None = None


def find_pictures(prompt: Prompt, embeds: torch.Tensor, family: Any, recent: Recent) -> None:
    """Say which encoded entries are the pictures of a prompt; leaves them in the prompt.

    Args:
        prompt: The prompt.
        embeds: What would enter the language model, (B, T, D).
        family: The family of the model.
        recent: The encodings of late.

    Raises:
        UnsupportedInputError: If they don't fit its placeholders, or nothing is known of them.
    """
    if prompt.pictures:
        return
    kinds = [kind for kind in KINDS if kind in prompt.encoded or kind in prompt.encodings]
    sources = prompt.sources or [_source(kind, prompt, recent) for kind in kinds]
    words = (row_keys(embeds) if prompt.ids is None else prompt.ids).cpu()
    for repeat in (n for n in range(1, len(prompt.visual) + 1) if len(prompt.visual) % n == 0):
        rows = prompt.kinds[::repeat]
        if torch.equal(rows.repeat_interleave(repeat, 0), prompt.kinds):
            pictures = _match(sources, rows, words[::repeat].tolist(), family, repeat)
            if pictures is not None:
                if repeat > 1:
                    _check_copies(embeds.detach().unflatten(0, (-1, repeat)), rows > 0)
                prompt.pictures, prompt.repeat = pictures, repeat
                return
    have = ", ".join(
        f"{(prompt.kinds == number + 1).sum(1).tolist()} {kind} placeholders"
        for number, kind in enumerate(KINDS)
        if (prompt.kinds == number + 1).any()
    )
    got = " and ".join(f"the encoded {source.kind}s, of {source.lengths} tokens" for source in sources)
    raise UnsupportedInputError(
        f"the prompts have {have or 'no placeholders'}, which don't fit {got or 'the images: there are none'}; pass "
        "the images and videos of these very prompts. With prefill_chunk_size, a chunk may not cut an image: use "
        "a larger one, or None"
    )


def _check_copies(embeds: torch.Tensor, visual: torch.Tensor) -> None:
    """Raise UnsupportedInputError if copies of prompts, (R, copies, T, D), differ in their visual tokens, (R, T)."""
    differ = (embeds != embeds[:, :1]).any(-1) & visual.to(embeds.device).unsqueeze(1)
    if differ.any():
        raise UnsupportedInputError(
            "the copies of a prompt that num_beams or num_return_sequences make have different images: this model in "
            "transformers mixes up the images of a prompt that has several; use one image a prompt, or no copies"
        )


def sources_in(embeds: torch.Tensor, recent: Recent) -> tuple[list[Source], torch.Tensor]:
    """Encoded pictures in embeddings that a caller merged, and what each token is, (B, T), int8; see `Prompt.kinds`."""
    kinds = torch.zeros(embeds.shape[:2], dtype=torch.int8)
    sources = {kind: Source(kind, None, [], []) for kind in KINDS}
    for row, found in enumerate(recent.find(embeds, gap=_GAP)):
        for each in found:
            source = sources[each.encoding.kind]
            source.found.append(each)
            source.lengths.append(each.length)
            kinds[row, each.places] = 1 + KINDS.index(source.kind)
    return [source for source in sources.values() if source.found], kinds


def _source(kind: str, prompt: Prompt, recent: Recent) -> Source:
    """What is known of the pictures of a kind that came with a prompt."""
    if kind not in prompt.encoded:
        encoding, entries = prompt.encodings[kind], None
    else:
        encoding, entries = record_of(prompt.encoded[kind]), entries_of(prompt.encoded[kind])
        if encoding is not None and entries is not None:
            given, known = sum(map(len, entries)), sum(encoding.lengths)
            if known == 0 or given % known:  # somebody cut them since
                encoding = None
    if encoding is not None:
        encoding.kind = kind  # some models encode videos by their encoder of images
        encoding = _thinned(encoding, prompt.thinned.get(kind))
        return Source(kind, encoding, encoding.lengths)
    found = _recognise(entries, recent)
    lengths = [len(entry) for entry in entries] if found is None else [each.length for each in found]
    return Source(kind, None, lengths, found)


def _thinned(encoding: Encoding, mask: torch.Tensor | None) -> Encoding:
    """What is known of pictures of which the model itself takes the tokens of a mask, (V,), alone."""
    if mask is None or bool(mask.all()):
        return encoding
    mask = mask.cpu().bool()
    lengths = [int(own.sum()) for own in mask.split(encoding.lengths)]
    keys, spans = encoding.keys, lengths
    if encoding.spans != encoding.lengths:
        keys, spans = keys.sum(0, keepdim=True), [sum(lengths)]
    known = {"lengths": lengths, "keys": keys, "spans": spans, "rows": encoding.rows[mask]}
    return replace(encoding, **known, seen=mask, whole=encoding, notes={})


def _recognise(entries: list[torch.Tensor] | None, recent: Recent) -> list[Found] | None:
    """Where features that lost their record come from, seen by their rows; None if they were never seen."""
    if not entries:
        raise UnsupportedInputError(
            "the images of this prompt were not encoded by the model while the method was on it, and their "
            "features are not to be seen; pass pixel_values. get_image_features() of a model must take these, and "
            "return features, (images, tokens, width), a list of them, or an output that has them as pooler_output"
        )
    features = torch.cat(entries)
    found = recent.find(features.unsqueeze(0))[0]
    if not found and not recent.knows_any(features):
        return None
    if sum(each.length for each in found) != len(features):
        raise UnsupportedInputError(
            "the encoded images of this prompt were cut, so that some are there in part only. prefill_chunk_size "
            "does that: use a chunk size with which no image is cut, or None"
        )
    return found


def _match(
    sources: list[Source], kinds: torch.Tensor, words: list[list[int]], family: Any, repeat: int
) -> list[Picture] | None:
    """The pictures of some prompts, in their order, or None if the entries don't fit the placeholders.

    Args:
        sources: The encoded pictures, of each kind.
        kinds: What the placeholders stand for: 0 for none, 1 + the number of a kind, (R, T).
        words: The prompts, by row.
        family: The family of the model.
        repeat: How often each prompt is repeated. Each kind of pictures may be repeated alike, or not.
    """
    numbers = torch.cumsum(kinds.flatten() > 0, 0).view(kinds.shape) - 1  # of each visual token among all of them
    pictures: list[Picture] = []
    seen = 0
    for source in sources:
        # Where videos stand at the placeholders of images, there is one kind of them.
        places = kinds > 0 if len(sources) == 1 else kinds == 1 + KINDS.index(source.kind)
        spots = [row.nonzero().squeeze(1).tolist() for row in places]
        pieces, times = _pieces(source, spots, words, family), 1
        if pieces is None:
            times = repeat
            pieces = _pieces(source, _each(spots, times), _each(words, times), family)
        if pieces is None:
            return None
        offset, used = 0, [0] * len(spots)
        for number, length in pieces:
            row, copy = divmod(number, times)
            if copy:
                offset += length
                continue
            own = spots[row][used[row] : used[row] + length]
            start = int(numbers[row, own[0]])
            if int(numbers[row, own[-1]]) - start != length - 1:
                return None
            pictures.append(_known(Picture(source.kind, row, start, length, source.encoding, offset), source))
            offset, used[row] = offset + length, used[row] + length
        seen += sum(used)
    if seen != int((kinds > 0).sum()):
        return None
    return sorted(pictures, key=lambda picture: picture.start)


def _pieces(
    source: Source, spots: list[list[int]], words: list[list[int]], family: Any
) -> list[tuple[int, int]] | None:
    """Row and length of each picture of a kind, in the order of the entries; None if they don't fit.

    Args:
        source: The encoded pictures.
        spots: Where their placeholders are, by row.
        words: The prompts, by row.
        family: The family of the model.
    """
    room = [len(row) for row in spots]
    ends = {0, *accumulate(source.lengths)}
    if family.unit == "entry":
        lengths = _lengths(source, family)
        rows = iter(range(len(spots)))
        row, left, pieces = -1, 0, []
        for length in filter(None, lengths):
            while left == 0:
                row = next(rows, len(spots))
                if row == len(spots):
                    return None
                left = room[row]
            if length > left:
                return None
            pieces.append((row, length))
            left -= length
        if sum(room) != sum(source.lengths):
            return None
        return _whole_videos(pieces, spots, words, family.joins) if source.kind == "video" and family.gap else pieces
    pieces = [(row, length) for row, own in enumerate(spots) for length in _runs(own, words[row], family.joins)]
    if sum(room) != sum(source.lengths):
        return None
    borders = accumulate(room if family.unit == "row" else [length for _, length in pieces])
    return pieces if ends.issuperset(borders) else None


def _lengths(source: Source, family: Any) -> list[int]:
    """Visual tokens of each picture, where entries are pictures, or tiles or frames that came together."""
    if source.encoding is not None or source.found is None:
        return source.lengths if source.encoding is None else family.picture_lengths(source.encoding)
    lengths, found = [], source.found
    while found:
        encoding, first = found[0].encoding, found[0].entry
        count = len(encoding.lengths) // len(family.picture_lengths(encoding))
        own = found[:count]
        if [each.entry for each in own if each.encoding is encoding] != list(range(first, first + count)):
            own = own[:1]
        lengths.append(sum(each.length for each in own))
        found = found[len(own) :]
    return lengths


def _whole_videos(
    pieces: list[tuple[int, int]], spots: list[list[int]], words: list[list[int]], joins: Joins
) -> list[tuple[int, int]]:
    """Put entries of a row together that belong to one video: the next one begins with the time of its first frame."""
    whole: list[tuple[int, int]] = []
    used, starts = [0] * len(spots), [0] * len(spots)
    for row, length in pieces:
        own, begin = words[row], spots[row][used[row]]
        is_more = False
        if used[row]:
            end = spots[row][used[row] - 1] + 1
            told = own[end + 1 : begin]  # without the mark at the end of the one before
            is_again = len(told) > 1 and told == own[max(0, starts[row] - len(told)) : starts[row]]
            is_more = joins(own, end, begin) and not is_again
        if is_more:
            whole[-1] = row, whole[-1][1] + length
        else:
            whole.append((row, length))
            starts[row] = begin
        used[row] += length
    return whole


def _runs(spots: list[int], words: list[int], joins: Joins) -> list[int]:
    """Visual tokens of each image of a row: of a run of placeholders, or of several that belong together."""
    cuts = [0]
    for number, (before, after) in enumerate(pairwise(spots), start=1):
        if after > before + 1 and not joins(words, before + 1, after):
            cuts.append(number)
    return [b - a for a, b in pairwise([*cuts, len(spots)])] if spots else []


def _known(picture: Picture, source: Source) -> Picture:
    """A picture made of features that were found again, with what is known of these."""
    if source.found is None:
        return picture
    numbers = _between(source.lengths, picture.offset, picture.length)
    own = source.found[numbers.start : numbers.stop]
    entries = [each.entry for each in own]
    is_one = all(each.encoding is own[0].encoding for each in own)
    if not is_one or entries != list(range(entries[0], entries[0] + len(own))):
        return replace(picture, encoding=None)
    inside = picture.offset - sum(source.lengths[: numbers.start])  # of the first entry
    return replace(picture, encoding=own[0].encoding, offset=sum(own[0].encoding.lengths[: entries[0]]) + inside)


def _each(values: list[Any], times: int) -> list[Any]:
    """Each value so many times."""
    return [value for value in values for _ in range(times)]
