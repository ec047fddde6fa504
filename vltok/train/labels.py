"""From where the answers are in the text to a label per token, for processors that replace a picture by many tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

IGNORE = -100  # the label that losses skip


class AlignmentError(ValueError):
    """The processor's tokens are not those of the text with its pictures replaced."""


@dataclass(frozen=True)
class PictureRun:
    """Tokens that one picture became, or several adjacent ones.

    Attributes:
        start: First token.
        stop: Token behind the last.
        pictures: How many pictures.
    """

    start: int
    stop: int
    pictures: int


def tokens_in(offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[bool]:
    """Say for each token, given by its first character and the one behind its last, whether it reaches into a place."""
    return [any(start < stop and start < end and stop > begin for begin, end in places) for start, stop in offsets]


def label_tokens(
    text_ids: Sequence[int],
    is_answer: Sequence[bool],
    ids: Sequence[int],
    placeholder: int,
    image_ids: Collection[int],
    separator_ids: Collection[int] = (),
) -> tuple[list[int], list[PictureRun]]:
    """Carry labels from the tokens of the text to the tokens of the processor.

    Both sequences are cut into text and runs of picture tokens. Text must agree token for token. Separators may be
    ordinary tokens too: those of the text beside a picture are found again at the ends of the run.

    Args:
        text_ids: Tokens of the text with one placeholder per picture.
        is_answer: Which of them are to be learned.
        ids: Tokens of the processor for the same text.
        placeholder: The placeholder in the text.
        image_ids: Tokens that only pictures have: placeholders, and what the processor puts around them.
        separator_ids: Tokens that the processor also writes between or behind the placeholders of a picture.

    Returns:
        The labels of `ids`, -100 where there is nothing to learn, and where the pictures are.

    Raises:
        AlignmentError: If the sequences differ in more than the pictures.
    """
    image_ids = {*image_ids, placeholder}
    short, long = _runs(text_ids, image_ids, separator_ids), _runs(ids, image_ids, separator_ids)
    if len(short) != len(long):
        raise AlignmentError(f"the text has {len(short)} runs of pictures, the processor wrote {len(long)}")
    labels: list[int] = []
    runs: list[PictureRun] = []
    read = 0  # tokens of the text that are done
    for (start, stop), (first, last) in zip(short, long, strict=True):
        lead = next(index for index in range(start, stop) if text_ids[index] in image_ids)
        tail = next(index for index in range(stop, start, -1) if text_ids[index - 1] in image_ids)
        first, last = first + lead - start, last - (stop - tail)
        labels += _copy(text_ids, is_answer, ids, slice(read, lead), slice(len(labels), first))
        labels += [IGNORE] * (last - first)
        runs.append(PictureRun(first, last, sum(token == placeholder for token in text_ids[lead:tail])))
        read = tail
    labels += _copy(text_ids, is_answer, ids, slice(read, len(text_ids)), slice(len(labels), len(ids)))
    return labels, runs


def _runs(ids: Sequence[int], image_ids: Collection[int], separator_ids: Collection[int]) -> list[tuple[int, int]]:
    """Unbroken runs of image and separator tokens with an image token among them."""
    runs, start = [], None
    for index, token in enumerate([*ids, None]):
        if token in image_ids or token in separator_ids:
            start = index if start is None else start
        elif start is not None:
            if any(inner in image_ids for inner in ids[start:index]):
                runs.append((start, index))
            start = None
    return runs


def _copy(
    text_ids: Sequence[int], is_answer: Sequence[bool], ids: Sequence[int], source: slice, target: slice
) -> list[int]:
    expected, found = list(text_ids[source]), list(ids[target])
    if expected != found or target.stop < target.start:
        raise AlignmentError(f"the text has tokens {expected} where the processor wrote {found}")
    return [token if keep else IGNORE for token, keep in zip(found, is_answer[source], strict=True)]
