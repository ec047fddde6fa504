"""What a server is told about pruning, and what a request may ask for."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

import vltok
import vltok.serving.options as options
from vltok.errors import CheckpointError, UnsupportedInputError, UnsupportedModelError
from vltok.method import Method
from vltok.methods import Selector
from vltok.serving.options import (
    Pruning,
    budget_parts,
    check_positions,
    check_servable,
    check_unasked,
    identity,
    of_numbers,
    to_numbers,
    without_budget,
)

QUARTER = vltok.DivPrune(keep_ratio=0.25)
SERVABLE = (
    *("divprune,keep_ratio=0.25", "todre,keep_ratio=0.3,relevance=False", "random,keep_ratio=0.5"),
    *("fastervlm,keep_ratio=0.25", "visionzip,keep_ratio=0.3", "pool,keep_ratio=0.25", "evs,keep_ratio=0.4"),
)
REFUSED = {
    "todre,keep_ratio=0.25": "relevance=False",
    "fastv,keep_ratio=0.5": "choose a selector",
    "pyramid_drop": "choose a selector",
    "cdpruner,keep_ratio=0.25": "reads the question",
    "tokenpacker": "choose a selector",
}


@pytest.mark.parametrize("text", SERVABLE)
def test_text_and_settings_say_the_same(text):
    method = Method.from_text(text)
    settings = {name: value for name, value in json.loads(json.dumps(method.to_dict())).items() if name != "method"}
    for field in (text, {"method": method.name, **settings}):
        pruning = Pruning.of_field(field)
        assert pruning.selector == pruning.largest == method


def test_settings_name_the_method_and_the_largest_budget():
    pruning = Pruning.of_field(
        {"method": "divprune", "keep_ratio": 0.25, "positions": "reindex", "max_keep_ratio": 0.5}
    )
    assert pruning.selector == vltok.DivPrune(keep_ratio=0.25, positions="reindex")
    assert pruning.largest == vltok.DivPrune(keep_ratio=0.5, positions="reindex")
    assert Pruning.of_field({"method": "divprune", "keep_ratio": 0.25, "max_num_keep": 9}).largest.num_keep == 9


@pytest.mark.parametrize(
    "field",
    [
        *(None, 3, [], {}, {"keep_ratio": 0.5}, {"method": 3}, "", "nothing,keep_ratio=0.5"),
        *("divprune", "divprune,keep_ratio=2", {"method": "divprune", "keep_ratio": 0.5, "share": 1}),
        {"method": "divprune", "keep_ratio": 0.5, "max_keep_ratio": 1.5},
        {"method": "divprune", "keep_ratio": 0.5, "max_keep_ratio": 0.4},
        {"method": "divprune", "num_keep": 5, "max_num_keep": 4},
        {"method": "divprune", "keep_ratio": 0.5, "max_keep_ratio": 0.6, "max_num_keep": 4},
    ],
    ids=repr,
)
def test_a_field_that_means_nothing_is_refused(field):
    with pytest.raises((CheckpointError, ValueError, TypeError)):
        Pruning.of_field(field)


@pytest.mark.parametrize("text", REFUSED)
def test_what_no_server_can_do_is_refused_with_the_way_out(text):
    with pytest.raises(UnsupportedModelError, match=REFUSED[text]):
        Pruning.of_field(text)


def test_a_config_without_the_field_asks_for_nothing_and_a_saved_method_is_refused():
    assert Pruning.of_config(SimpleNamespace()) is None
    assert Pruning.of_config(SimpleNamespace(vltok={"methods": []})) is None  # that is for who loads the model
    with pytest.raises(CheckpointError, match="remove the method"):
        Pruning.of_config(SimpleNamespace(vltok={"methods": []}, vltok_pruning="divprune,keep_ratio=0.5"))
    assert Pruning.of_config(SimpleNamespace(vltok_pruning="divprune,keep_ratio=0.25")).selector == QUARTER


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, QUARTER),
        ({"visual_keep_ratio": None}, QUARTER),
        ({"max_pixels": 100}, QUARTER),
        ({"visual_keep_ratio": 0.1}, vltok.DivPrune(keep_ratio=0.1)),
        ({"visual_num_keep": 7, "max_pixels": 100}, vltok.DivPrune(num_keep=7)),
    ],
)
def test_a_request_has_its_own_budget(asked, expected):
    assert Pruning(QUARTER, QUARTER).of_request(asked) == expected


@pytest.mark.parametrize(
    "asked",
    [
        *({"visual_keep_ratio": value} for value in (0, -1, 1.5, math.nan, "half", [0.5])),
        *({"visual_num_keep": value} for value in (0, -1, 2.5, "3")),
        {"visual_keep_ratio": 0.5, "visual_num_keep": 3},
    ],
    ids=repr,
)
def test_a_request_with_a_budget_that_is_none_is_refused(asked):
    with pytest.raises((ValueError, TypeError), match=r"keep_ratio|num_keep"):
        Pruning(QUARTER, QUARTER).of_request(asked)


def test_a_request_is_counted_and_refused_above_the_largest():
    pruning = Pruning.of_field({"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.5})
    assert pruning.count(pruning.selector, 40, None, "image") == 10
    assert pruning.count(pruning.of_request({"visual_num_keep": 20}), 40, None, "image") == 20
    with pytest.raises(ValueError, match="asks for 21 of 40 visual tokens, and this server was started for at most 20"):
        pruning.count(pruning.of_request({"visual_num_keep": 21}), 40, None, "image")


def test_each_frame_of_a_video_has_its_budget_if_that_is_wanted():
    own = vltok.DivPrune(keep_ratio=0.25, per="frame")
    parts = list(budget_parts(own, 25, (2, 3, 4), "video"))  # a token behind the frames belongs to the last one
    assert parts == [(0, 12, (1, 3, 4)), (12, 25, (1, 3, 4))]
    assert list(budget_parts(own, 25, (2, 3, 4), "image")) == [(0, 25, (2, 3, 4))]
    assert Pruning(own, own).count(own, 25, (2, 3, 4), "video") == round(0.25 * 12) + round(0.25 * 13)


def test_the_most_that_may_be_asked_for_is_never_below_what_is_counted():
    for text in SERVABLE:
        pruning = Pruning.of_field(text)
        for frames, rows, columns in ((1, 3, 4), (2, 5, 5), (7, 1, 2)):
            length = frames * rows * columns
            for kind in ("image", "video")[frames > 1 :]:
                counted = pruning.count(pruning.selector, length, (frames, rows, columns), kind)
                assert counted <= pruning.most(length, kind) <= length
    assert Pruning(QUARTER, QUARTER).most(100, "image") == 25
    own = vltok.DivPrune(keep_ratio=0.25, per="frame")
    assert (Pruning(own, own).most(100, "image"), Pruning(own, own).most(100, "video")) == (25, 100)


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.1}, {"keep_ratio": 1 / 3}, {"num_keep": 1}, {"num_keep": 123_456}])
def test_a_budget_travels_as_numbers(budget):
    sent = to_numbers(vltok.DivPrune(**budget))
    assert of_numbers(QUARTER, sent) == vltok.DivPrune(**budget)
    assert all(isinstance(each, float) for each in sent)


def test_identities_tell_methods_budgets_and_versions_apart(monkeypatch):
    own = [*map(Method.from_text, SERVABLE), QUARTER, vltok.DivPrune(num_keep=9), vltok.DivPrune(keep_ratio=0.26)]
    known = {identity(each) for each in own}
    assert len(known) == len({repr(each) for each in own})
    monkeypatch.setattr(options, "__version__", "0.0.1")
    assert not known & {identity(each) for each in own}


def test_the_processor_does_not_get_what_is_for_vltok():
    given = {"visual_keep_ratio": 0.1, "visual_num_keep": 3, "max_pixels": 9}
    assert without_budget(given) == {"max_pixels": 9}
    with pytest.raises(ValueError, match="visual_keep_ratio, visual_num_keep, and this server prunes nothing"):
        check_unasked(given)
    check_unasked({"max_pixels": 9})


def test_positions_on_several_axes_are_kept_or_refused():
    check_positions(QUARTER, has_axes=True)
    for positions in ("reindex", "stretch"):
        own = vltok.DivPrune(keep_ratio=0.25, positions=positions)
        check_positions(own, has_axes=False)
        with pytest.raises(UnsupportedInputError, match='use "keep"'):
            check_positions(own, has_axes=True)


def test_a_selector_of_ones_own_is_servable():
    class First(Selector):
        """Keeps the first tokens."""

    assert check_servable(First(keep_ratio=0.5)) == First(keep_ratio=0.5)
