"""Scores of eval.robustness: mCE and mFR by hand-written slow versions, and which output a folder means."""

from types import SimpleNamespace

import numpy as np
import pytest

from eval.image_classification.data import ArrayPictures
from eval.robustness.classifiers import match_outputs, open_classifiers, read_classes
from eval.robustness.scores import (
    ALEXNET_ERRORS,
    ALEXNET_FLIP_RATES,
    CORRUPTIONS,
    corruption_means,
    flip_share,
    is_noise,
    mean_corruption_error,
    mean_flip_rate,
    severity_means,
)

RANDOM = np.random.default_rng(1)
ERRORS = {name: {severity: float(RANDOM.uniform()) for severity in range(1, 6)} for name in CORRUPTIONS}


def test_mce_divides_each_corruption_s_summed_error_by_alexnet_s():
    total = 0.0
    for name in CORRUPTIONS:
        summed = sum(ERRORS[name][severity] for severity in (1, 2, 3, 4, 5))
        total += summed / (5 * ALEXNET_ERRORS[name])  # published as means over the severities
    assert mean_corruption_error(ERRORS) == pytest.approx(total / 15)
    fog = sum(ERRORS["fog"][severity] for severity in (1, 2, 3, 4, 5)) / 5
    third = sum(ERRORS[name][3] for name in CORRUPTIONS) / 15
    assert corruption_means(ERRORS)["fog"] == pytest.approx(fog) and severity_means(ERRORS)[3] == pytest.approx(third)


def test_alexnet_itself_scores_one_hundred_percent():
    errors = {name: dict.fromkeys(range(1, 6), value) for name, value in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(errors) == pytest.approx(1) and mean_flip_rate(ALEXNET_FLIP_RATES) == pytest.approx(1)
    assert len(ALEXNET_ERRORS) == 15 and len(ALEXNET_FLIP_RATES) == 10
    assert np.mean(list(ALEXNET_ERRORS.values())) == pytest.approx(0.789, abs=5e-4)


def test_an_incomplete_set_has_no_mce():
    assert mean_corruption_error({name: ERRORS[name] for name in CORRUPTIONS[:3]}) is None
    assert mean_corruption_error({name: {1: each[1], 5: each[5]} for name, each in ERRORS.items()}) is None
    assert mean_corruption_error({}) is None and mean_flip_rate({"tilt": 0.1}) is None


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


def pictures(classes, labels=(0, 1, 1)):
    return ArrayPictures(np.zeros((3, 4, 4), np.uint8), np.array(labels), classes, "made")


def outputs(names, count):
    return SimpleNamespace(names=names, num_outputs=count)


def test_classes_are_matched_by_name_not_by_place():
    matched = match_outputs(pictures(["n3", "n1"]), outputs(["n0", "n1", "n2", "n3"], 4), "here")
    assert matched.labels.tolist() == [3, 1, 1] and matched.open(0).size == (4, 4)
    assert match_outputs(pictures(None), outputs(["n0", "n1"], 2), "here").labels.tolist() == [0, 1, 1]
    assert match_outputs(pictures(["b", "a"]), outputs(None, 2), "here").labels.tolist() == [0, 1, 1]


def test_classes_that_fit_no_output_are_explained():
    with pytest.raises(ValueError, match=r"here has 1 classes that are none of the model's 2: n9; those are named n0"):
        match_outputs(pictures(["n0", "n9"]), outputs(["n0", "n1"], 2), "here")
    with pytest.raises(ValueError, match=r"2 classes, the model 5 outputs.*--classes"):
        match_outputs(pictures(["a", "b"]), outputs(None, 5), "here")
    with pytest.raises(ValueError, match="labels up to 1, the model 1 outputs"):
        match_outputs(pictures(None), outputs(None, 1), "here")


def test_names_of_outputs_come_from_a_file_a_folder_the_data_or_imagenet(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("n02 tench\nn01 goldfish\n\n")
    for name in ("b", "a"):
        (tmp_path / "val" / name).mkdir(parents=True)
    assert read_classes(file) == ["n02", "n01"] and read_classes(tmp_path / "val") == ["a", "b"]
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    opened = [
        open_classifiers("vit_tiny_patch16_224", kwargs, clean, classes=classes).names
        for clean, classes in ((pictures(["a", "b"]), file), (pictures(["a", "b"]), None), (pictures(None), None))
    ]
    assert opened == [["n02", "n01"], ["a", "b"], None]
    imagenet = open_classifiers("vit_tiny_patch16_224", kwargs, None)
    assert imagenet.names[:2] == ["n01440764", "n01443537"]
    with pytest.raises(ValueError, match="--classes names 2 classes, the model has 3"):
        open_classifiers("vit_tiny_patch16_224", kwargs | {"num_classes": 3}, None, classes=file)
    file.write_text("a\na\n")
    with pytest.raises(ValueError, match="every class once"):
        read_classes(file)
