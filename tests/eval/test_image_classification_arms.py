"""How arms of image classification are written, and in which order they train."""

import pytest

import vltok
from eval.image_classification.arms import Arm, parse_arm, parse_methods, plan_arms, training_order
from eval.image_classification.settings import parse_fields, parse_seeds
from vltok.errors import CheckpointError

SOFT = vltok.SOFT(ratio=2)


def test_an_arm_is_a_name_perhaps_a_start_and_methods_joined_by_plus():
    assert parse_arm("softmax=") == Arm("softmax")
    assert parse_arm("soft=soft,ratio=2") == Arm("soft", (SOFT,))
    assert parse_arm("t@softmax=soft,ratio=2") == Arm("t", (SOFT,), "softmax")
    assert parse_arm("t@a/b-{seed}.safetensors=") == Arm("t", (), "a/b-{seed}.safetensors")
    two = parse_methods("soft,blocks=(0,1),ratio=2+todre,keep_ratio=1e-1")
    assert two == (vltok.SOFT(blocks=(0, 1), ratio=2), vltok.ToDRE(keep_ratio=0.1))
    assert parse_methods('{"method": "soft", "version": 1, "ratio": 2}') == (SOFT,)
    assert parse_methods("divprune,keep_ratio=1e+0") == (vltok.DivPrune(keep_ratio=1.0),)


@pytest.mark.parametrize("text", ["soft", "soft,ratio=2", "=soft", "a b=soft", "../x=soft", "a@=soft"])
def test_an_arm_that_is_written_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="an arm is written NAME=METHODS"):
        parse_arm(text)


def test_an_unknown_method_is_refused():
    with pytest.raises(CheckpointError, match="unknown method 'sift'"):
        parse_arm("a=sift")


def test_methods_without_arms_make_one_arm_and_nothing_makes_the_plain_one():
    assert plan_arms([], ["soft,ratio=2"], None) == [Arm("soft", (SOFT,))]
    assert plan_arms([], [], None) == [Arm("plain")]
    with pytest.raises(ValueError, match="--method without --arm"):
        plan_arms(["a="], ["soft"], None)


def test_the_common_start_is_for_arms_with_methods_that_name_none():
    arms = plan_arms(["a=", "b=soft,ratio=2", "c@d=soft,ratio=2", "d="], [], "a")
    assert [arm.start for arm in arms] == [None, "a", "d", None]


def test_starts_train_before_what_starts_from_them():
    arms = plan_arms(["c@b=soft,ratio=2", "b@a=", "a=", "z="], [], None)
    order = [arm.name for arm in training_order(arms)]
    assert order.index("a") < order.index("b") < order.index("c") and len(order) == 4


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["a=", "A="], "a name of its own"),
        (["a@x=soft"], "none of the arms; add --arm"),
        (["a=soft", "b@a="], "only start from an arm without methods"),
        (["a@b=", "b@a="], "start from each other"),
        (["a@a="], "start from each other"),
    ],
)
def test_arms_that_contradict_each_other_are_refused(arms, message):
    with pytest.raises(ValueError, match=message):
        plan_arms(arms, [], None)


def test_settings_are_literals_or_words():
    text = "img_size=32, scale=(0.6,1.0),global_pool=avg,flag=True,x=None,aa=rand-m9-mstd0.5"
    fields = {
        "img_size": 32,
        "scale": (0.6, 1.0),
        "global_pool": "avg",
        "flag": True,
        "x": None,
        "aa": "rand-m9-mstd0.5",
    }
    assert parse_fields(text) == fields and parse_fields("") == {}
    for wrong, message in (("a", "key=value"), ("a=1,a=2", "twice"), ("1=2", "key=value")):
        with pytest.raises(ValueError, match=message):
            parse_fields(wrong)


def test_seeds_are_different_whole_numbers():
    assert parse_seeds("0, 7,2") == [0, 7, 2]
    for wrong in ("", "a", "1,1", "-1", "1.5"):
        with pytest.raises(ValueError, match="different whole numbers"):
            parse_seeds(wrong)
