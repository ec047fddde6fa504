"""Labels are carried over pictures of any length, with separators or without, and never by guessing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vltok.train.labels import IGNORE, AlignmentError, PictureRun, label_tokens, tokens_in

P, START, END, COMMA, LINE = 90, 91, 92, 80, 81  # placeholder, what surrounds a picture, and two separators
_ = IGNORE


def test_a_token_that_reaches_into_an_answer_belongs_to_it():
    offsets = [(0, 0), (0, 5), (4, 6), (5, 9), (9, 9), (9, 12)]
    assert tokens_in(offsets, [(5, 9)]) == [False, False, True, True, False, False]
    assert tokens_in(offsets, [(0, 1), (11, 20)]) == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("text", "learn", "ids", "labels", "runs"),
    [
        # question, picture, answer
        ([1, P, 2, 3], [3], [1, P, P, P, 2, 3], [_, _, _, _, _, 3], [PictureRun(1, 4, 1)]),
        # a second picture behind the first answer, none at all, and two in a row
        ([P, 5, 1, P, 6], [5, 6], [P, P, 5, 1, P, P, P, 6], [_, _, 5, _, _, _, _, 6], [(0, 2, 1), (4, 7, 1)]),
        ([1, 2], [2], [1, 2], [_, 2], []),
        ([P, P, 4], [4], [P, P, P, P, P, 4], [_, _, _, _, _, 4], [(0, 5, 2)]),
        # a start and an end token around the picture
        ([1, P, 4], [4], [1, START, P, P, END, 4], [_, _, _, _, _, 4], [(1, 5, 1)]),
        # separators: the answer begins with one, and one stands before the picture
        ([LINE, P, COMMA, 4], [COMMA, 4], [LINE, P, COMMA, P, LINE, COMMA, 4], [_] * 5 + [COMMA, 4], [(1, 5, 1)]),
        ([COMMA, 1, P], [COMMA], [COMMA, 1, P, LINE], [COMMA, _, _, _], [(2, 4, 1)]),
    ],
)
def test_hand_worked_cases(text, learn, ids, labels, runs):
    found = label_tokens(text, [token in learn for token in text], ids, P, (P, START, END), (COMMA, LINE))
    assert found == (labels, [run if isinstance(run, PictureRun) else PictureRun(*run) for run in runs])


PIECE = st.lists(st.sampled_from([1, 2, 3, COMMA, LINE]), max_size=4)
PICTURE = st.lists(st.sampled_from([P, COMMA, LINE]), max_size=5).map(lambda tokens: [START, P, *tokens])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PIECE, PICTURE), min_size=1, max_size=4), PIECE, st.data())
def test_text_beside_pictures_keeps_its_labels_whatever_the_pictures_are(pieces, last, data):
    """Built from both sides, so that true labels are known; text between pictures has words beside separators."""
    text, learn, ids, labels = [], [], [], []
    for index, (piece, image) in enumerate([*pieces, (last, [])]):
        piece = piece if index in (0, len(pieces)) else [1, *piece, 1]
        wanted = [data.draw(st.booleans()) for _ in piece]
        text += [*piece, P] if image else piece
        learn += [*wanted, False] if image else wanted
        ids += piece + image
        labels += [token if keep else IGNORE for token, keep in zip(piece, wanted, strict=True)] + [IGNORE] * len(image)
    assert label_tokens(text, learn, ids, P, (START,), (COMMA, LINE))[0] == labels


@pytest.mark.parametrize(
    "ids", [[1, P, P, 2, 4], [1, P, P, 3], [7, P, P, 2, 3], [1, 2, 3], [1, P, 2, P, 3], [1, P, P, 2, 3, 3]]
)
def test_tokens_that_differ_in_more_than_the_picture_are_an_error(ids):
    with pytest.raises(AlignmentError):
        label_tokens([1, P, 2, 3], [False, False, False, True], ids, P, (P,))
