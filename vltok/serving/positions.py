"""Rotary positions of prompts whose images were pruned before the prompt was written.

A server writes as many placeholders as tokens are kept, before it is known which. Text has its positions at once: it
goes on where it would behind the whole image. A kept token's offset from the start of its image travels with it, in
channels behind its embedding, and is filled in when it enters the decoder. Until then its place says, as -1 - start,
where the image starts. An image of 2 x 3 tokens of which the first and the fifth are kept, between words:

    prompt       w   i   i   w   w
    at first     0  -2  -2   4   5        on every axis
    filled in    0   1   1   4   5        frame
                 0   1   2   4   5        row
                 0   1   2   4   5        column
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

AXES = 3
_BASE = 256  # whole numbers up to this are exact in bfloat16
_DIGITS = 2
CHANNELS = (AXES + 1) * _DIGITS


@dataclass(frozen=True)
class Media:
    """An image or video in a prompt.

    Attributes:
        begin: Its first token that is left.
        end: One behind the last one.
        span: How many positions it takes: text behind it begins so many after its start.
    """

    begin: int
    end: int
    span: int


def prompt_positions(length: int, media: Sequence[Media], stretch: bool = False) -> tuple[torch.Tensor, int]:
    """Positions of a prompt before it is known which tokens were kept.

    Args:
        length: Tokens of the prompt, T.
        media: Its images and videos, in the order of their places.
        stretch: Whether those that stand side by side are spread evenly over all their positions, whichever they are.

    Returns:
        Positions, (3, T), int64, -1 - start for tokens of an image or video that are not stretched; and how far behind
        its place the next word's position is.
    """
    positions = torch.zeros(length, dtype=torch.int64)
    place, position = 0, 0
    for each in _side_by_side(media) if stretch else media:
        count = each.begin - place
        positions[place : each.begin] = torch.arange(position, position + count)
        position += count
        own = each.end - each.begin
        spread = torch.arange(own) * (each.span - 1) // max(1, own - 1)
        positions[each.begin : each.end] = position + spread if stretch else -1 - position
        place, position = each.end, position + each.span
    positions[place:] = torch.arange(position, position + length - place)
    return positions.expand(AXES, length).clone(), position + length - place - length


def _side_by_side(media: Sequence[Media]) -> list[Media]:
    """Images with no word between them as one."""
    joined: list[Media] = []
    for each in media:
        if joined and joined[-1].end == each.begin:
            each = Media(joined[-1].begin, each.end, joined.pop().span + each.span)
        joined.append(each)
    return joined


def with_offsets(embeddings: torch.Tensor, offsets: torch.Tensor, span: int) -> torch.Tensor:
    """Append where each token stands in its image, and how many positions that takes.

    Args:
        embeddings: Kept tokens, (K, D), any float dtype.
        offsets: Their positions, counted from the start of the image, (3, K), int64.
        span: The positions of the image.

    Returns:
        (K, D + 8), in the dtype of the embeddings: each number as two digits, exact in bfloat16.

    Raises:
        ValueError: If a number is negative, or does not fit.
    """
    numbers = torch.cat([offsets, torch.full_like(offsets[:1], span)])  # (4, K)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < _BASE**_DIGITS:
        raise ValueError(f"offsets of tokens in an image must be in 0..{_BASE**_DIGITS - 1}, got {numbers.tolist()}")
    digits = torch.stack([numbers // _BASE**power % _BASE for power in range(_DIGITS)])  # (2, 4, K)
    return torch.cat([embeddings, digits.flatten(0, 1).T.to(embeddings)], dim=1)


def split_offsets(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `with_offsets`: embeddings, (K, D), and numbers, (4, K), int64: the offsets, and the span."""
    digits = embeddings[:, -CHANNELS:].T.long().unflatten(0, (_DIGITS, -1))
    return embeddings[:, :-CHANNELS], sum(digits[power] * _BASE**power for power in range(_DIGITS))


def fill_in(positions: torch.Tensor, slots: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Give placeholders the positions of the tokens that stand there now.

    A server asks again with every token that it generates, and then knows no numbers. So if the last token of a prompt
    is one of an image, its further axes say where the image ends. This suits models that read the first axis alone.

    Args:
        positions: As `prompt_positions` left them, (3, T); places that were filled in before stay, so it does no harm
            to begin anew.
        slots: The places, (K,), int64, ascending.
        numbers: What `split_offsets` says of their tokens, (4, K).

    Returns:
        The positions, (3, T), a new tensor; and how far behind its place the next word's position is. That is not known
        before the last token of the prompt is there, if it is one of an image.
    """
    before = positions[:, slots]
    filled = positions.index_copy(1, slots, torch.where(before < 0, -1 - before + numbers[:AXES], before))
    length = positions.shape[1]
    if len(slots) and int(slots[-1]) == length - 1:
        filled[1:, -1] = filled[0, -1] - numbers[0, -1] + numbers[AXES, -1] - 1
    return filled, int(filled[:, -1].max()) + 1 - length
