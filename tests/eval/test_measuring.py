"""What the measuring commands share: options, tables, turns and finished measurements."""

import argparse
import itertools
import json
from contextlib import contextmanager

import pytest
import torch

from eval import measure, options
from eval.store import Store
from eval.tables import Table, write_json


def parsed(*argv: str, quick=None) -> argparse.Namespace:
    command = options.parser("About.", options.common("device", "dtypes", "rounds", "seconds", "quick", rounds=5))
    return options.parse(command, argv, quick)


def test_quick_changes_defaults_and_not_what_was_asked_for():
    quick = {"rounds": 2, "seconds": 1.0}
    assert (parsed().rounds, parsed().seconds) == (5, 60.0)
    assert (parsed("--quick", quick=quick).rounds, parsed("--quick", quick=quick).seconds) == (2, 1.0)
    assert parsed("--rounds", "5", "--quick", quick=quick).rounds == 5


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "nowhere"], "nowhere can't be used"),
        (["--dtypes", "float32,int7"], "any of float32, bfloat16, float16, got 'float32,int7'"),
        (["--rounds", "0"], "a whole number from 1 on, got '0'"),
        (["--rounds", "1,2"], "a whole number from 1 on"),
        (["--rounds", "two"], "got 'two'"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(argv, said, capsys):
    with pytest.raises(SystemExit) as error:
        parsed(*argv)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_lists_are_read():
    assert options.numbers("1, 8") == [1, 8]
    assert options.shares("1,0.25") == [1.0, 0.25]
    assert parsed("--dtypes", "bfloat16,float32").dtypes == ["bfloat16", "float32"]
    for text in ("0", "", "0.5,1.5", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be numbers in"):
            options.shares(text)


def test_unknown_shared_options_are_refused():
    with pytest.raises(ValueError, match="got speed"):
        options.common("rounds", "speed")


def test_a_table_lines_up_as_text_and_as_markdown():
    table = Table(("name", "ms"), title="times", notes=["a note"])
    table.add("a | b", 1.5)
    table.section()
    table.add("two\nlines", None)
    assert table.text() == ("times\nname    ms\n-----  ---\na | b  1.5\n-----  ---\ntwo      -\nlines\na note\n")
    assert table.markdown() == (
        "**times**\n\n| name | ms |\n| --- | ---: |\n| a \\| b | 1.5 |\n| two<br>lines | - |\n\na note\n"
    )
    with pytest.raises(ValueError, match="2 columns, got 1 cells"):
        table.add("alone")


def test_nobody_always_runs_first_and_what_is_around_is_not_timed():
    ticks, seen = itertools.count(), []

    @contextmanager
    def around(name):
        next(ticks)
        yield
        next(ticks)

    times = measure.timed(
        {name: lambda name=name: seen.append(name) for name in "abc"},
        clean=lambda: next(ticks),
        rounds=2,
        around=around,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(seen) == "abcbcacab"
    assert times == {name: [1.0, 1.0] for name in "abc"}


def test_a_case_stops_when_its_time_is_up_but_not_before_three_rounds():
    ticks = itertools.count()
    times = measure.timed({"a": lambda: None}, rounds=50, seconds=0.5, clock=lambda: float(next(ticks)))
    assert len(times["a"]) == 3


def test_ratios_are_taken_within_a_round():
    assert measure.ratio([2, 40, 6], [1, 10, 2]) == 3  # not the ratio of medians, 6 / 2 of other rounds
    assert measure.quartiles([2, 40, 6, 8], [1, 10, 2, 1]) == pytest.approx((2.75, 3.5, 5.0))
    assert measure.quartiles([3], [2]) == (1.5, 1.5, 1.5)


def test_allocations_are_counted():
    weight = torch.nn.Linear(8, 8, bias=False)
    peak = measure.peak_bytes(lambda: torch.empty(1000, dtype=torch.uint8), weight, "cpu", accumulating=True)
    assert 1000 <= peak < 1100


def test_a_stopped_bench_goes_on_where_it_was(tmp_path):
    made = []

    def figures():
        made.append(1)
        return {"top1": 0.5, "pair": (1, 2)}

    settings = {"seed": 0, "sizes": (1, 2)}
    for _ in range(2):
        assert Store(tmp_path).get("clean/1", settings, figures) == {"top1": 0.5, "pair": [1, 2]}
    assert len(made) == 1
    Store(tmp_path).get("clean/1", {**settings, "seed": 1}, figures)
    Store(tmp_path).get("clean-1", settings, figures)
    assert len(made) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_notes_decide_nothing(tmp_path):
    Store(tmp_path, {"threads": 1}).write("clean", {}, 1)
    assert Store(tmp_path, {"threads": 2}).read("clean", {}) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"name": "clean"}', "\x00"])
def test_damaged_measurements_are_named(tmp_path, content):
    store = Store(tmp_path)
    store.path("clean", {}).write_text(content)
    with pytest.raises(ValueError, match=r"clean-[0-9a-f]{16}\.json is no finished measurement"):
        store.read("clean", {})


def test_a_file_under_another_name_is_refused(tmp_path):
    store = Store(tmp_path)
    store.write("clean", {"seed": 0}, 1)
    store.path("clean", {"seed": 0}).rename(store.path("clean", {"seed": 1}))
    with pytest.raises(ValueError, match="holds another measurement"):
        store.read("clean", {"seed": 1})


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    for content in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, content)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]
