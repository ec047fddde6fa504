"""The canvas VQA task: reproducible pictures, separate splits, and questions with exactly one right answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.canvas import data
from eval.canvas.data import (
    KINDS,
    NUMBERS,
    ONE_WORD,
    QUADRANTS,
    SIZE,
    SPLITS,
    Canvases,
    kinds_known,
    load_items,
    photo_regions,
    split_items,
)

SOME = range(60)


@pytest.fixture(scope="module")
def test_canvases():
    return Canvases("test", seed=3, kinds=KINDS)


@settings(max_examples=12, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 10**6), split=st.sampled_from(SPLITS))
def test_a_canvas_is_a_function_of_split_seed_and_index(index, seed, split):
    first, again = Canvases(split, seed), Canvases(split, seed)
    again.canvas(index + 1)
    one, other = first.canvas(index), again.canvas(index)
    for field in ("image", "labels", "boxes", "ink"):
        assert np.array_equal(getattr(one, field), getattr(other, field))
    assert first.questions(index) == again.questions(index)


def test_splits_and_seeds_and_indices_give_different_canvases():
    images = [Canvases(split, seed).canvas(index).image for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    assert len({image.tobytes() for image in images}) == len(images)


def test_splits_share_no_digit_and_each_holds_every_label():
    labels = data.digits().labels
    chosen = {split: split_items(labels, split) for split in SPLITS}
    together = np.concatenate(list(chosen.values()))
    assert np.array_equal(np.sort(together), np.arange(1797))
    sizes = [len(chosen[split]) for split in SPLITS]
    assert sizes == pytest.approx([1200, 200, 397], abs=15)
    for numbers in chosen.values():
        counts = np.bincount(labels[numbers], minlength=10)
        assert counts.min() > 0.8 * counts.max()


def test_splits_share_no_photo_pixel():
    covered = {}
    for split in SPLITS:
        for name, (x0, y0, x1, y1) in photo_regions(split):
            width, height = data.photo(name).size
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            used = covered.setdefault(name, np.zeros((height, width), int))
            used[y0:y1, x0:x1] += 1
    assert set(covered) == set(data.PHOTOS)
    assert max(used.max() for used in covered.values()) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_background_crops_stay_inside_the_regions_of_their_split(split, monkeypatch):
    boxes = []
    real = data.photo

    class Recorder:
        def __init__(self, name):
            self.name, self.size = name, real(name).size

        def crop(self, box):
            boxes.append((self.name, box))
            return real(self.name).crop(box)

    canvases = Canvases(split)
    monkeypatch.setattr(data, "photo", Recorder)
    for index in SOME:
        canvases.canvas(index)
    allowed = dict(photo_regions(split))
    assert len(boxes) == len(SOME)
    for name, (x0, y0, x1, y1) in boxes:
        left, top, right, bottom = allowed[name]
        assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


def test_a_canvas_has_one_to_six_items_inside_it_that_do_not_overlap(test_canvases):
    counts = set()
    for index in SOME:
        canvas = test_canvases.canvas(index)
        assert canvas.image.shape == (SIZE, SIZE, 3) and canvas.image.dtype == np.uint8
        counts.add(len(canvas.labels))
        occupied = np.zeros((SIZE, SIZE), int)
        for x0, y0, x1, y1 in canvas.boxes:
            assert min(x0, y0) >= 0 and max(x1, y1) <= SIZE
            assert 20 <= x1 - x0 <= 32 and 20 <= y1 - y0 <= 32
            occupied[y0:y1, x0:x1] += 1
        assert occupied.max() <= 1
    assert counts == set(range(1, 7))


def test_positions_are_not_aligned_to_patches(test_canvases):
    corners = np.concatenate([test_canvases.canvas(index).boxes[:, :2] for index in SOME])
    for axis in (0, 1):
        assert len(np.unique(corners[:, axis] % data.PATCH)) == data.PATCH


def test_items_differ_from_the_photo_only_inside_their_boxes(test_canvases, monkeypatch):
    canvas = test_canvases.canvas(5)
    monkeypatch.setattr(data, "_stretch", lambda item, width, height, degrees: np.zeros((height, width), np.float32))
    empty = test_canvases.canvas(5).image
    changed = (canvas.image != empty).any(axis=-1)
    inside = np.zeros((SIZE, SIZE), bool)
    for x0, y0, x1, y1 in canvas.boxes:
        assert changed[y0:y1, x0:x1].any()
        inside[y0:y1, x0:x1] = True
    assert not changed[~inside].any()


def test_items_come_lighter_and_darker_than_the_photo(test_canvases):
    rng = np.random.default_rng(0)
    grey = np.full((20, 20, 3), 128, np.float32)
    shades = np.array([data._contrasting_colour(rng, grey).mean() for _ in range(100)])
    assert (shades > 200).sum() > 20 and (shades < 56).sum() > 20
    white = np.full((20, 20, 3), 255, np.float32)
    assert all(data._contrasting_colour(rng, white).mean() < 200 for _ in range(20))


def _truth(canvas):
    """Plain re-reading of a canvas: for each item its name and its quadrant, None within the margin of a midline."""
    items = []
    for label, (x0, y0, x1, y1) in zip(canvas.labels, canvas.boxes, strict=True):
        x, y = (x0 + x1) / 2 - 64, (y0 + y1) / 2 - 64
        clear = abs(x) >= data.MIDLINE_MARGIN and abs(y) >= data.MIDLINE_MARGIN
        place = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
        items.append((NUMBERS[label], place if clear else None))
    return items


def test_every_question_has_exactly_one_right_answer(test_canvases):
    asked = dict.fromkeys(KINDS, 0)
    for index in SOME:
        canvas = test_canvases.canvas(index)
        items = _truth(canvas)
        names = [name for name, _ in items]
        every = test_canvases.all_questions(index, canvas, 1, 4)
        for question in (q for questions in every.values() for q in questions):
            asked[question.kind] += 1
            word = question.text.split()[-1]
            if question.kind == "exist":
                assert question.answer == ("yes" if word in names else "no")
            elif question.kind == "where":
                assert names.count(word) == 1
                assert dict(items)[word] == question.answer
            elif question.kind == "quadrant":
                # No item near enough to the quadrant's border to be counted in or out.
                assert [name for name, place in items if place == word] == [question.answer]
                assert word in QUADRANTS
            elif question.kind == "box":
                assert names.count(word) == 1
                assert question.answer == _box(canvas.ink[names.index(word)])
            elif question.kind == "read":
                # In each of the side's two quadrants one item, as for questions about a quadrant.
                there = [[name for name, place in items if place == quadrant] for quadrant in READ[word]]
                assert [len(found) for found in there] == [1, 1]
                assert question.answer == f"{there[0][0]} {there[1][0]}"
            else:
                assert question.answer == NUMBERS[len(items)]
    assert min(asked.values()) >= 25


READ = {
    "top": ("top-left", "top-right"),
    "bottom": ("bottom-left", "bottom-right"),
    "left": ("top-left", "bottom-left"),
    "right": ("top-right", "bottom-right"),
}


def _box(ink):
    """First and last column and row of the patches that an item covers by 8 % or more, one patch after the other."""
    columns, rows = [], []
    for row in range(16):
        for column in range(16):
            if ink[row, column] >= 0.08:
                columns.append(column)
                rows.append(row)
    return f"{min(columns)} {min(rows)} {max(columns)} {max(rows)}"


def test_a_box_holds_what_the_item_changes_in_the_picture_and_little_else(test_canvases, monkeypatch):
    shares = []
    for index in range(12):
        canvas = test_canvases.canvas(index)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_stretch", lambda item, width, height, degrees: np.zeros((height, width), np.float32))
            empty = test_canvases.canvas(index).image
        changed = np.abs(canvas.image.astype(int) - empty).max(axis=-1)
        for (left, top, right, bottom), (x0, y0, x1, y1) in zip(canvas.patch_boxes, canvas.boxes, strict=True):
            own = np.zeros_like(changed)
            own[y0:y1, x0:x1] = changed[y0:y1, x0:x1]
            inside = own[8 * top : 8 * bottom + 8, 8 * left : 8 * right + 8]
            shares.append(inside.sum() / own.sum())
            # each side of the box shows something: a box one patch smaller would cut it off
            assert min(own[8 * top : 8 * top + 8].max(), own[8 * bottom : 8 * bottom + 8].max()) > 20
            assert min(own[:, 8 * left : 8 * left + 8].max(), own[:, 8 * right : 8 * right + 8].max()) > 20
    assert min(shares) > 0.9 and np.mean(shares) > 0.97


def test_boxes_and_readings_change_no_picture_and_no_other_question(test_canvases):
    plain = Canvases("test", seed=3)
    for index in SOME:
        assert np.array_equal(plain.canvas(index).image, test_canvases.canvas(index).image)
        asked = test_canvases.questions(index)
        assert plain.questions(index) == [question for question in asked if question.kind in ONE_WORD]
    first = [(q.text, q.answer) for q in Canvases("test", seed=0).questions(1)]
    assert first == [  # of the published tables
        ("is there a zero", "yes"),
        ("is there a seven", "no"),
        ("which item is in the bottom-right", "zero"),
        ("where do you see the nine", "top-right"),
        ("how many items do you see", "two"),
    ]


def test_words_of_boxes_and_readings_stand_behind_the_others_so_that_a_model_without_them_can_be_told():
    words = data.vocabulary(NUMBERS)
    short = words[:33]
    assert short == sorted(short) and "yes" in short and "0" not in short and "box" not in short
    assert kinds_known(words) == KINDS and kinds_known(short) == ONE_WORD
    assert kinds_known([word for word in words if word != "15"]) == (*ONE_WORD, "read")
    with pytest.raises(ValueError, match="kinds must be of"):
        Canvases("test", kinds=("exist", "colour"))


def test_a_quadrant_is_not_asked_about_when_another_centre_is_near_its_border(monkeypatch):
    canvases = Canvases("val", kinds=KINDS)
    canvas = data.Canvas(
        image=np.zeros((SIZE, SIZE, 3), np.uint8),
        labels=np.array([3, 5]),
        boxes=np.array([[10, 10, 30, 30], [56, 10, 76, 30]]),  # the second centre is 2 px right of the midline
        ink=np.zeros((2, 16, 16), np.float32),
    )
    every = canvases.all_questions(0, canvas, 1, 4)
    assert every["quadrant"] == every["read"] == []
    assert every["box"] == []  # nothing to see
    assert [(q.text.split()[-1], q.answer) for q in every["where"]] == [("three", "top-left")]


def test_exist_is_balanced_and_absent_items_are_spread_over_the_labels(test_canvases):
    questions = [q for index in range(200) for q in test_canvases.questions(index)]
    exist = [q for q in questions if q.kind == "exist"]
    assert sum(q.answer == "yes" for q in exist) == sum(q.answer == "no" for q in exist) == 200
    absent = [q.text.split()[-1] for q in exist if q.answer == "no"]
    assert set(absent) == set(NUMBERS)
    for kind, answers, share in (("where", QUADRANTS, 0.25), ("count", NUMBERS[1:7], 1 / 6)):
        given_answers = [q.answer for q in questions if q.kind == kind]
        shares = [given_answers.count(answer) / len(given_answers) for answer in answers]
        assert max(shares) < share + 0.12 and min(shares) > share - 0.12


def test_answers_and_questions_use_the_vocabulary_of_about_sixty_words(test_canvases):
    words = data.vocabulary(NUMBERS)
    assert 50 <= len(words) == len(set(words)) <= 65
    for index in SOME:
        for question in test_canvases.questions(index):
            assert {*question.text.split(), *question.answer.split()} <= set(words)


def test_covered_area_alone_does_not_tell_the_count():
    canvases = Canvases("train")
    pictures = [canvases.canvas(index) for index in range(400)]
    area = np.array([canvas.ink.sum() for canvas in pictures])
    count = np.array([len(canvas.labels) for canvas in pictures])
    first, last = slice(0, 200), slice(200, 400)
    means = np.array([area[first][count[first] == n].mean() for n in range(1, 7)])
    guess = 1 + np.abs(area[last][:, None] - means).argmin(axis=1)
    assert (guess == count[last]).mean() < 0.6


def _write_items(path, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 255, size=(60, 14, 11), dtype=np.uint8),
        "labels": np.arange(60) % 3,
        "names": np.array(["shoe", "bag", "apple"]),
    }
    arrays |= change
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_other_items_of_any_size_take_the_place_of_the_digits(tmp_path):
    items = load_items(_write_items(tmp_path / "items.npz"))
    canvases = Canvases("test", items=items)
    texts = {q.text for index in range(40) for q in canvases.questions(index)}
    assert canvases.canvas(0).image.shape == (SIZE, SIZE, 3)
    assert texts & {"is there a shoe", "do you see a bag"} and texts & {"is there an apple", "do you see an apple"}
    assert "seven" not in data.vocabulary(items.names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "needs the arrays"),
        ({"images": np.zeros((60, 4, 4), np.float32)}, "uint8"),
        ({"images": np.zeros((60, 16), np.uint8)}, "uint8"),
        ({"labels": np.zeros(59, int)}, r"\(60,\) integers"),
        ({"labels": np.full(60, 3)}, r"0\.\.2"),
        ({"names": np.array(["shoe", "hand bag", "apple"])}, "single words"),
        ({"names": np.array(["shoe", "shoe", "apple"])}, "different"),
    ],
)
def test_a_malformed_items_file_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_items(_write_items(tmp_path / "items.npz", **change))


@pytest.mark.parametrize(
    "arguments", [{"split": "dev"}, {"split": "test", "min_items": 0}, {"split": "test", "min_items": 7}]
)
def test_an_unknown_split_or_item_number_is_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        Canvases(**arguments)
