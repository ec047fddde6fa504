"""Positions of pruned prompts, compared with those of the unpruned prompt from which tokens are taken."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vltok.serving.positions import CHANNELS, Media, fill_in, prompt_positions, split_offsets, with_offsets


@dataclass(frozen=True)
class Image:
    """An image of rows x columns tokens with so many words before it, and the tokens that are kept."""

    words: int
    grid: tuple[int, int]
    kept: tuple[int, ...]
    axes: bool

    @property
    def offsets(self) -> list[tuple[int, int, int]]:
        """The positions of all its tokens, from its start."""
        rows, columns = self.grid
        if self.axes:
            return [(0, row, column) for row in range(rows) for column in range(columns)]
        return [(place,) * 3 for place in range(rows * columns)]

    @property
    def span(self) -> int:
        return max(map(max, self.offsets)) + 1


@st.composite
def images(draw, axes: bool) -> Image:
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kept = draw(st.sets(st.integers(0, grid[0] * grid[1] - 1), min_size=1))
    return Image(draw(st.integers(0, 4)), grid, tuple(sorted(kept)), axes)


@st.composite
def prompts(draw) -> tuple[list[Image], int]:
    """Images with words between, and the words behind the last; an image may stand last where axes agree."""
    axes = draw(st.booleans())
    drawn = draw(st.lists(images(axes), max_size=4))
    return drawn, draw(st.integers(int(axes or not drawn), 5))


def naive(prompt: list[Image], words: int) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of what is left, token by token, and the position of the next word."""
    positions, position = [], 0
    for image in prompt:
        positions += [(position + word,) * 3 for word in range(image.words)]
        position += image.words
        positions += [tuple(position + each for each in image.offsets[token]) for token in image.kept]
        position += image.span
    positions += [(position + word,) * 3 for word in range(words)]
    return positions, position + words


def media_of(prompt: list[Image]) -> list[Media]:
    media, place = [], 0
    for image in prompt:
        place += image.words
        media.append(Media(place, place + len(image.kept), image.span))
        place += len(image.kept)
    return media


def numbers_of(image: Image) -> torch.Tensor:
    """What travels with the kept tokens of an image, (4, K)."""
    return torch.tensor([(*image.offsets[token], image.span) for token in image.kept]).T


@settings(deadline=None, max_examples=200)
@given(prompts(), st.data())
def test_filled_positions_are_those_of_the_tokens_that_are_left(drawn, data):
    prompt, words = drawn
    expected, following = naive(prompt, words)
    media = media_of(prompt)
    positions, delta = prompt_positions(len(expected), media)
    assert delta == following - len(expected)
    pieces = []  # of images, in any order and some of them twice, as chunks and lost requests have them
    for each, image in zip(media, prompt, strict=True):
        cut = data.draw(st.integers(0, len(image.kept)))
        slots, numbers = torch.arange(each.begin, each.end), numbers_of(image)
        pieces += [(slots[:cut], numbers[:, :cut]), (slots[cut:], numbers[:, cut:])]
    again = data.draw(st.lists(st.sampled_from(pieces), max_size=3)) if pieces else []
    for slots, numbers in data.draw(st.permutations(pieces + again)):
        positions, _ = fill_in(positions, slots, numbers)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(4, 0, dtype=torch.int64)
    for _ in range(2):  # a server asks again with every token that it generates
        positions, delta = fill_in(positions, *nothing)
        assert delta == following - len(expected)
    count = 3 if words else 1  # at the end of a prompt, the further axes say where the image ends
    assert positions[0].tolist() == [own[0] for own in expected]
    assert positions[:count, -1:].T.tolist() == [[*own[:count]] for own in expected[-1:]]
    assert positions[:, :-1].T.tolist() == [[*own] for own in expected[:-1]]


@settings(deadline=None)
@given(prompts())
def test_text_has_its_positions_before_any_image_is_there(drawn):
    prompt, words = drawn
    expected, _ = naive(prompt, words)
    positions, _ = prompt_positions(len(expected), media_of(prompt))
    inside = {place for each in media_of(prompt) for place in range(each.begin, each.end)}
    for place, own in enumerate(expected):
        assert positions[:, place].tolist() == [*own] if place not in inside else (positions[:, place] < 0).all()


def test_the_example_of_the_module():
    positions, delta = prompt_positions(5, [Media(1, 3, 3)])
    assert positions.tolist() == [[0, -2, -2, 4, 5]] * 3
    filled, again = fill_in(positions, torch.tensor([1, 2]), torch.tensor([[0, 0], [0, 1], [0, 1], [3, 3]]))
    assert filled.tolist() == [[0, 1, 1, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]
    assert delta == again == 1


def test_stretched_images_spread_over_their_places_and_those_side_by_side_are_one():
    apart, _ = prompt_positions(6, [Media(1, 4, 9)], stretch=True)
    assert apart[0].tolist() == [0, 1, 5, 9, 10, 11]
    beside, delta = prompt_positions(6, [Media(1, 3, 4), Media(3, 5, 5)], stretch=True)
    assert beside[0].tolist() == [0, *(1 + place * 8 // 3 for place in range(4)), 10]
    assert delta == 5
    alone, _ = prompt_positions(1, [Media(0, 1, 9)], stretch=True)
    assert alone[0].tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_travel_exactly_behind_embeddings_of_any_dtype(dtype):
    embeddings = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.tensor([[0, 1, 255, 256, 65_534], [0, 257, 4095, 40_000, 65_535], [7, 300, 999, 511, 0]])
    sent = with_offsets(embeddings, offsets, 65_535)
    assert (sent.shape, sent.dtype) == ((5, 16 + CHANNELS), dtype)
    own, numbers = split_offsets(sent)
    assert torch.equal(own, embeddings)
    assert torch.equal(numbers, torch.cat([offsets, torch.full((1, 5), 65_535)]))


@pytest.mark.parametrize("number", [-1, 65_536])
def test_numbers_that_do_not_fit_are_refused(number):
    with pytest.raises(ValueError, match=r"must be in 0\.\.65535"):
        with_offsets(torch.zeros(1, 4), torch.tensor([[0], [number], [0]]), 3)
