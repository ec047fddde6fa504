"""How arms of image classification are written, and what they start from."""

import pytest

import vltok
from eval.image_classification.arms import Arm, find_weights, parse_arm, parse_arms, parse_fields, parse_seeds, start_of
from vltok.errors import CheckpointError

SOFT = vltok.SOFT(ratio=2)


def test_an_arm_is_a_name_perhaps_a_start_and_methods_joined_by_plus():
    assert parse_arm("softmax=") == Arm("softmax") and parse_arm("soft=soft,ratio=2") == Arm("soft", (SOFT,))
    assert parse_arm("t@softmax=soft,ratio=2") == Arm("t", (SOFT,), "softmax")
    assert parse_arm("t@a/b-{seed}.safetensors=") == Arm("t", (), "a/b-{seed}.safetensors")
    two = parse_arm("x=soft,blocks=(0,1),ratio=2+todre,keep_ratio=1e-1")
    assert two.methods == (vltok.SOFT(blocks=(0, 1), ratio=2), vltok.ToDRE(keep_ratio=0.1))
    assert two.words.startswith("soft(ratio=2, blocks=(0, 1)) + todre(keep_ratio=0.1") and parse_arm("x=").words == "-"
    assert parse_arm('x={"method": "soft", "version": 1, "ratio": 2}').methods == (SOFT,)
    assert parse_arm("x=divprune,keep_ratio=1e+0").methods == (vltok.DivPrune(keep_ratio=1.0),)


@pytest.mark.parametrize("text", ["soft", "soft,ratio=2", "=soft", "a b=soft", "../x=soft", "a@=soft"])
def test_an_arm_that_is_written_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="an arm is written NAME=METHODS"):
        parse_arm(text)


def test_unknown_methods_and_names_that_meet_are_refused():
    with pytest.raises(CheckpointError, match="unknown method 'sift'"):
        parse_arm("a=sift")
    with pytest.raises(ValueError, match="a name of its own"):
        parse_arms(["a=", "A="])


def test_the_common_start_is_for_arms_with_methods_that_name_none():
    arms = parse_arms(["a=", "d=", "b=soft,ratio=2", "c@d=soft,ratio=2"], "a")
    assert [arm.start for arm in arms] == [None, None, "a", "d"]
    assert [start_of(arm, arms) for arm in arms] == [None, None, arms[0], arms[1]]


@pytest.mark.parametrize("texts", [["a@x=soft"], ["a=soft", "b@a="], ["a@b=", "b="], ["a@a="]])
def test_a_start_is_a_file_or_stands_before_without_methods(texts):
    arms = parse_arms(texts)
    with pytest.raises(ValueError, match="no arm without methods before it and no file"):
        [start_of(arm, arms) for arm in arms]
    assert start_of(parse_arm("a@x.pth=soft"), [parse_arm("a@x.pth=soft")]) is None


def test_weights_are_found_by_name_seed_and_one_star(tmp_path):
    for name in ("soft-seed1-ab.pth", "soft-seed2-ab.pth", "soft-seed2-cd.pth"):
        (tmp_path / name).touch()
    pattern = f"{tmp_path}/{{arm}}-seed{{seed}}-*.pth"
    assert find_weights(pattern, Arm("soft"), 1).name == "soft-seed1-ab.pth"
    with pytest.raises(ValueError, match=r"ab\.pth or soft-seed2-cd\.pth"):
        find_weights(pattern, Arm("soft"), 2)
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*, of arm 'soft'"):
        find_weights(pattern, Arm("soft"), 3)


def test_settings_are_literals_or_words():
    text = "img_size=32, scale=(0.6,1.0),global_pool=avg,flag=True,x=None,aa=rand-m9-mstd0.5"
    fields = {"img_size": 32, "scale": (0.6, 1.0), "global_pool": "avg", "flag": True, "x": None}
    assert parse_fields(text) == fields | {"aa": "rand-m9-mstd0.5"} and parse_fields("") == {}
    for wrong in ("a", "a=1,a=2", "1=2"):
        with pytest.raises(ValueError, match="key=value, each once"):
            parse_fields(wrong)


def test_seeds_are_different_whole_numbers():
    assert parse_seeds("0, 7,2") == [0, 7, 2]
    for wrong in ("", "a", "1,1", "-1", "1.5"):
        with pytest.raises(ValueError, match="different whole numbers"):
            parse_seeds(wrong)
