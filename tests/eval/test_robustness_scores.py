"""Scores of eval.robustness: mCE and mFR by hand-written slow versions, and which output a folder means."""

import numpy as np
import pytest

from eval.image_classification.npz import ArraySource
from eval.robustness.classes import match_outputs, output_names, read_classes
from eval.robustness.corruptions import CORRUPTIONS
from eval.robustness.published import ALEXNET_ERRORS, ALEXNET_FLIP_RATES
from eval.robustness.scores import corruption_scores, flip_score, flip_share, is_noise

RANDOM = np.random.default_rng(1)
ERRORS = {name: {severity: float(RANDOM.uniform()) for severity in range(1, 6)} for name in CORRUPTIONS}


def test_mce_divides_each_corruption_s_summed_error_by_alexnet_s():
    total = 0.0
    for name in CORRUPTIONS:
        summed = sum(ERRORS[name][severity] for severity in (1, 2, 3, 4, 5))
        total += summed / (5 * ALEXNET_ERRORS[name])  # published as means over the severities
    scores = corruption_scores(ERRORS)
    assert scores["mce"] == pytest.approx(total / 15)
    plain = sum(ERRORS[name][severity] for name in CORRUPTIONS for severity in (1, 2, 3, 4, 5)) / 75
    assert scores["mean_error"] == pytest.approx(plain)


def test_alexnet_itself_scores_one_hundred_percent():
    assert corruption_scores({name: dict.fromkeys(range(1, 6), value) for name, value in ALEXNET_ERRORS.items()})[
        "mce"
    ] == pytest.approx(1)
    assert flip_score(ALEXNET_FLIP_RATES) == pytest.approx(1)
    assert len(ALEXNET_ERRORS) == 15 and len(ALEXNET_FLIP_RATES) == 10
    assert np.mean(list(ALEXNET_ERRORS.values())) == pytest.approx(0.789, abs=5e-4)


def test_an_incomplete_set_has_a_mean_but_no_mce():
    some = {name: ERRORS[name] for name in CORRUPTIONS[:3]}
    assert corruption_scores(some)["mce"] is None
    assert corruption_scores(some)["mean_error"] == pytest.approx(np.mean([list(e.values()) for e in some.values()]))
    fewer = {name: {1: each[1], 5: each[5]} for name, each in ERRORS.items()}
    assert corruption_scores(fewer)["mce"] is None
    assert corruption_scores({}) == {"mean_error": None, "mce": None}
    assert flip_score({"tilt": 0.1}) is None


@pytest.mark.parametrize("compare_with_first", [False, True])
def test_flips_are_counted_as_a_loop_counts_them(compare_with_first):
    for _ in range(20):
        answers = RANDOM.integers(0, 3, RANDOM.integers(2, 9)).tolist()
        flips, reference = [], answers[0]
        for answer in answers[1:]:
            flips.append(answer != reference)
            if not compare_with_first:
                reference = answer
        assert flip_share(answers, compare_with_first) == pytest.approx(sum(flips) / len(flips))


def test_only_noise_is_compared_with_the_first_frame():
    assert [name for name in ALEXNET_FLIP_RATES if is_noise(name)] == ["gaussian_noise", "shot_noise"]
    assert flip_share([0, 1, 1, 0], True) == pytest.approx(2 / 3)
    assert flip_share([0, 1, 1, 0], False) == pytest.approx(2 / 3)
    assert flip_share([0, 1, 1, 1], True) == 1 and flip_share([0, 1, 1, 1], False) == pytest.approx(1 / 3)


def source(classes, labels=(0, 1, 1)):
    return ArraySource(np.zeros((3, 4, 4), np.uint8), np.array(labels), classes, "made")


def test_classes_are_matched_by_name_not_by_place():
    matched = match_outputs(source(["n3", "n1"]), ["n0", "n1", "n2", "n3"], 4, "here")
    assert matched.labels.tolist() == [3, 1, 1] and matched.open(0).size == (4, 4)
    assert match_outputs(source(None), ["n0", "n1"], 2, "here").labels.tolist() == [0, 1, 1]
    assert match_outputs(source(["b", "a"]), None, 2, "here").labels.tolist() == [0, 1, 1]


def test_classes_that_fit_no_output_are_explained():
    with pytest.raises(ValueError, match=r"here has 1 classes that are none of the model's 2: n9; those are named n0"):
        match_outputs(source(["n0", "n9"]), ["n0", "n1"], 2, "here")
    with pytest.raises(ValueError, match=r"2 classes, the model 5 outputs.*--classes"):
        match_outputs(source(["a", "b"]), None, 5, "here")
    with pytest.raises(ValueError, match="labels up to 1, the model 1 outputs"):
        match_outputs(source(None), None, 1, "here")


def test_names_of_outputs_come_from_a_file_a_folder_the_data_or_imagenet(tmp_path):
    (tmp_path / "names.txt").write_text("n02 tench\nn01 goldfish\n\n")
    assert read_classes(tmp_path / "names.txt") == ["n02", "n01"]
    for name in ("b", "a"):
        (tmp_path / "val" / name).mkdir(parents=True)
    assert read_classes(tmp_path / "val") == ["a", "b"]
    (tmp_path / "names.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match="'a' more than once"):
        read_classes(tmp_path / "names.txt")
    with pytest.raises(ValueError, match="names no classes"):
        read_classes(tmp_path / "val" / "a")
    assert output_names(2, ["x", "y"], ["a", "b"]) == ["x", "y"] and output_names(2, None, ["a", "b"]) == ["a", "b"]
    assert output_names(3, None, ["a", "b"]) is None
    assert output_names(1000, None, ["a", "b"])[:2] == ["n01440764", "n01443537"]
    with pytest.raises(ValueError, match="--classes names 1 classes, the model has 2"):
        output_names(2, ["x"], None)
