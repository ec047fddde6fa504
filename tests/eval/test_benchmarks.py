"""The pure parts of eval.benchmarks: plans, worth of samples, intervals, tables, hard samples, published figures."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import statistics
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vltok
from eval.benchmarks import __main__ as command
from eval.benchmarks import bootstrap, compare, hard, plots, runner, scores, table
from eval.benchmarks.plan import FLOORS, Row, fingerprint, plan_rows
from eval.benchmarks.results import COSTS, MEAN, Cell, is_mean, summarise
from eval.store import Store
from vltok.errors import UnsupportedInputError

pytestmark = pytest.mark.quick


def cell(values, unit=1.0, tokens=100.0, higher_is_better=True, **changed):
    worth = {str(number): float(value) for number, value in enumerate(values)}
    score = unit * statistics.fmean(worth.values())
    cost = dict.fromkeys(COSTS, tokens) | {"visual_tokens": 576.0}
    facts = {"metric": "accuracy", "score": score, "higher_is_better": higher_is_better, "samples": len(worth)}
    facts |= {"values": worth, "figures": {"accuracy": score}, "cost": cost}
    return Cell(**{**facts, **changed})


def coins(seed, share, count=60):
    generator = random.Random(seed)
    return [generator.random() < share for _ in range(count)]


def comparison():
    """Rows at two budgets on two tasks, one of which has a score in %."""
    rows = {Row("unpruned"): {"pope": cell(coins(1, 0.9)), "docs": cell(coins(2, 0.8), 100)}}
    for k, row in enumerate(plan_rows("divprune,fastv;num_keep=9", [0.2, 0.1])[1:]):
        share = 0.4 + 0.05 * k % 0.5
        own = {"pope": coins(k + 3, share), "docs": coins(k + 40, share)}
        rows[row] = {"pope": cell(own["pope"], tokens=20.0 + k), "docs": cell(own["docs"], 100, tokens=20.0 + k)}
    return rows


COLUMNS = {"pope": ["pope"], "docs": ["docs"]}


# --- the plan


def test_floors_are_always_there_at_every_budget_and_the_unpruned_model_once_and_first():
    rows = plan_rows("divprune", [0.1, 0.2])
    names = ["resize", *FLOORS, "divprune"]
    assert [(row.name, row.keep_ratio) for row in rows] == [
        ("unpruned", 1.0),
        *[(name, 0.2) for name in names],
        *[(name, 0.1) for name in names],
    ]
    assert {row.method.keep_ratio for row in rows if row.method is not None} == {0.2, 0.1}


def test_settings_stand_behind_semicolons_and_a_method_with_its_own_budget_is_one_row():
    rows = plan_rows("divprune;positions=reindex,pyramid_drop;ratios=(0.4,0.2,0.1),divprune;num_keep=4", [0.3])
    by_name = {row.name: row for row in rows}
    own = by_name["divprune;positions=reindex"]
    assert (own.keep_ratio, own.method) == (0.3, vltok.DivPrune(keep_ratio=0.3, positions="reindex"))
    assert by_name["divprune;num_keep=4"].keep_ratio is None
    assert by_name["pyramid_drop;ratios=(0.4,0.2,0.1)"].method.ratios == (0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("methods", "keep", "said"),
    [
        ("divprun", [0.1], "did you mean 'divprune'"),
        ("divprune;position=keep", [0.1], "position"),
        ("divprune", [1.0], "unpruned model is there anyway"),
    ],
)
def test_a_wrong_method_or_budget_is_refused_by_name(methods, keep, said):
    with pytest.raises(ValueError, match=said):
        plan_rows(methods, keep)


def test_sets_stand_for_their_tasks_and_each_task_is_taken_once():
    assert scores.parse_tasks("hallucination, gqa,pope") == ["pope", "coco_cap_chair", "gqa"]
    with pytest.raises(ValueError, match="core, text"):
        scores.parse_tasks(" ,")


# --- resuming


def key_settings(**changed):
    settings = {"model": "m", "fingerprint": "f", "task": "pope", "limit": 8, "dtype": "float32", "batch_size": 1}
    row = changed.pop("row", plan_rows("divprune", [0.2])[5])
    return {**settings, **row.settings(), "versions": {"vltok": "1", "lmms-eval": "2"}, **changed}


def test_another_model_row_task_limit_or_version_is_another_file(tmp_path):
    store = Store(tmp_path)
    others = [
        key_settings(),
        key_settings(fingerprint="g"),
        key_settings(task="gqa"),
        key_settings(limit=None),
        key_settings(dtype="bfloat16"),
        key_settings(versions={"vltok": "2", "lmms-eval": "2"}),
        *(key_settings(row=row) for row in plan_rows("divprune;positions=reindex,divprune;num_keep=3", [0.2, 0.1])),
    ]
    assert len({store.path("cell", settings) for settings in others}) == len(others)


def test_a_fingerprint_sees_one_changed_byte_and_a_renamed_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"1235")
    changed = fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len({before, changed, fingerprint(str(tmp_path))}) == 3


def test_a_model_that_is_no_folder_and_not_in_the_cache_is_refused():
    with pytest.raises(ValueError, match="no folder"):
        fingerprint("nobody/nothing")


class FakeBench:
    """Answers without a model; `broken` are (row, task) and what they raise."""

    def __init__(self, broken=None):
        self.broken, self.asked, self.on = broken or {}, [], None

    @contextmanager
    def put_on(self, row):
        self.on = row.label
        yield
        self.on = None

    def run(self, task):
        self.asked.append((self.on, task))
        if (self.on, task) in self.broken:
            raise RuntimeError(f"no answer to document 3 of task {task}") from self.broken[self.on, task]
        return cell(coins(len(self.on), 0.5))


def finish(bench, store, setup=None):
    tasks = {task: {"task": task} for task in ("a", "b")}
    return runner.run(bench, plan_rows("divprune", [0.2]), tasks, setup or {"model": "m"}, store)


def test_a_later_run_asks_only_for_what_is_missing(tmp_path):
    first = FakeBench({("stride 20 %", "b"): ValueError("broken picture")})
    with pytest.raises(runner.CellError, match=r"stride 20 %, b: no answer to document 3 of task b"):
        finish(first, Store(tmp_path))
    second = FakeBench()
    cells, notes = finish(second, Store(tmp_path))
    assert second.asked == [("stride 20 %", "b"), ("divprune 20 %", "a"), ("divprune 20 %", "b")]
    assert notes == []
    assert [row.name for row in cells] == ["unpruned", "resize", *FLOORS, "divprune"]
    assert all(own == {task: cell(coins(len(row.label), 0.5)) for task in "ab"} for row, own in cells.items())
    third = FakeBench()
    assert finish(third, Store(tmp_path)) == (cells, [])
    assert third.asked == []
    other = FakeBench()
    finish(other, Store(tmp_path), {"model": "another"})
    assert len(other.asked) == 12


def test_a_floor_that_an_image_cannot_have_is_left_out_with_its_reason_and_not_tried_again(tmp_path):
    bench = FakeBench({("pool 20 %", "a"): UnsupportedInputError("no grid")})
    cells, notes = finish(bench, Store(tmp_path))
    assert [row.name for row in cells] == ["unpruned", "resize", "random", "stride", "divprune"]
    assert notes == ["No row for pool 20 %, a: no answer to document 3 of task a"]
    again = FakeBench()
    assert finish(again, Store(tmp_path)) == (cells, notes)
    assert again.asked == []


def test_a_method_that_an_image_cannot_have_fails(tmp_path):
    bench = FakeBench({("divprune 20 %", "b"): UnsupportedInputError("no grid")})
    with pytest.raises(runner.CellError, match="divprune 20 %, b"):
        finish(bench, Store(tmp_path))


# --- what samples are worth


def test_the_score_is_the_tasks_first_figure_that_is_a_number_but_for_known_ones():
    assert scores.choose_metric(["submission", "exact"], {"submission,none": None, "exact,none": 0.5}) == (
        "exact",
        "none",
    )
    figures = ["refcoco_IoU", "refcoco_ACC@0.5"]
    assert scores.choose_metric(figures, {f"{name},none": 0.1 for name in figures}) == ("refcoco_ACC@0.5", "none")
    with pytest.raises(ValueError, match="none of the figures"):
        scores.choose_metric(["exact"], {"exact,none": float("nan")})


def test_worth_is_a_number_or_the_score_in_a_record_or_what_one_sample_alone_gives():
    def never(items):
        raise RuntimeError("this figure's function must not be called")

    numbers = [{"doc_id": 3, "exact": 0.3}, {"doc_id": 1, "exact": True}, {"doc_id": 2, "other": 1}]
    assert scores.sample_values(numbers, "exact", never) == {"3": 0.3, "1": 1.0}
    scored = [{"doc_id": 0, "anls": {"score": 0.25}}]
    assert scores.sample_values(scored, "anls", never) == {"0": 0.25}
    pairs = [{"doc_id": k, "seed_all": {"pred": "A", "answer": each}} for k, each in enumerate("AB")]
    one = scores.sample_values(
        pairs, "seed_all", lambda items: sum(i["pred"] == i["answer"] for i in items) / len(items)
    )
    assert one == {"0": 1.0, "1": 0.0}
    percents = [{"doc_id": k, "coco_cap_chair_s": {}} for k in range(2)]
    assert scores.sample_values(percents, "coco_cap_chair_s", lambda items: 100.0) == {"0": 1.0, "1": 1.0}
    assert scores.sample_values([{"doc_id": 0, "words": {"text": "a"}}], "words", never) is None


def test_a_sample_that_came_through_two_filters_counts_with_the_first():
    twice = [{"doc_id": 0, "exact": 1.0}, {"doc_id": 1, "exact": 0.0}, {"doc_id": 0, "exact": 0.0}]
    assert scores.sample_values(twice, "exact", sum) == {"0": 1.0, "1": 0.0}


def test_a_score_is_a_mean_only_if_it_is_the_same_multiple_of_the_mean_worth_everywhere():
    fine = [cell([1, 0, 1, 1], 100), cell([1, 0, 0, 0], 100), cell([0, 0, 0, 0], 100)]
    assert is_mean(fine)
    assert not is_mean([*fine, cell([1, 1, 0, 0], 99.9)])
    assert not is_mean([*fine, cell([0, 0, 0, 0], score=3.0)])
    assert not is_mean([*fine, replace(fine[0], values=None)])


# --- intervals


def test_drawn_shares_have_the_spread_of_a_plain_loop_that_draws_pairs():
    plain, pruned = coins(1, 0.8), [a and b for a, b in zip(coins(1, 0.8), coins(2, 0.85), strict=True)]
    generator, shares = random.Random(5), []
    while len(shares) < 4000:
        chosen = [generator.randrange(len(plain)) for _ in plain]
        shares.append(sum(pruned[k] for k in chosen) / sum(plain[k] for k in chosen))
    shares.sort()
    naive = shares[int(0.025 * 4000)], shares[int(0.975 * 4000)]
    sides = [{str(k): float(value) for k, value in enumerate(side)} for side in (pruned, plain)]
    draws = bootstrap.share_draws([bootstrap.drawn_means(*sides, "task", 4000)])
    assert bootstrap.interval(draws) == pytest.approx(naive, abs=0.012)
    assert naive[1] - naive[0] > 0.1  # wide beside the tolerance
    unpaired = 2 * 1.96 * np.sqrt(2 * 0.2 / 0.8 / 60)  # without pairs it would be about this wide
    assert naive[1] - naive[0] < 0.75 * unpaired


def test_draws_are_the_same_samples_for_the_same_task_and_others_for_another():
    side = {str(k): float(k) for k in range(50)}
    first, again, other = (bootstrap.drawn_means(side, side, name, 20) for name in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(first[:, 0], first[:, 1])


def test_sides_with_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"task: .* one alone has 1: \['2'\]"):
        bootstrap.drawn_means({"1": 1.0}, {"1": 1.0, "2": 0.0}, "task")


def test_no_interval_is_claimed_where_a_draw_has_no_right_answer():
    rare = {str(k): float(k == 0) for k in range(4)}
    assert bootstrap.interval(bootstrap.share_draws([bootstrap.drawn_means(rare, rare, "task")])) is None


# --- records


def test_shares_and_means_are_those_worked_out_by_hand():
    rows = {
        Row("unpruned"): {"a": cell([1, 1, 1, 0]), "b": cell([1, 0], 100), "c": cell([1, 1], 100)},
        Row("resize", 0.5): {"a": cell([1, 1, 0, 0]), "b": cell([1, 0], 100, tokens=50), "c": cell([0, 1], 100)},
    }
    records = summarise(rows, {"a": ["a"], "both": ["b", "c"]})
    found = {(record["method"], record["task"]): record for record in records}
    assert found["resize", "a"]["share"] == pytest.approx(2 / 3)
    assert (found["unpruned", "both"]["score"], found["resize", "both"]["score"]) == (75.0, 50.0)
    assert found["resize", MEAN]["share"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["resize", "both"]["tokens_per_layer"] == 75.0
    assert found["resize", "both"]["samples"] == 4
    assert found["unpruned", MEAN]["share"] == 1.0


def test_the_mean_share_leaves_out_tasks_where_less_is_better():
    worse = {"higher_is_better": False}
    rows = {
        Row("unpruned"): {"a": cell([1, 1]), "chair": cell([1, 0], **worse)},
        Row("resize", 0.5): {"a": cell([1, 0]), "chair": cell([1, 1], **worse)},
    }
    records = {record["task"]: record for record in summarise(rows, {"a": ["a"], "chair": ["chair"]})[3:]}
    assert (records["chair"]["share"], records[MEAN]["share"]) == (2.0, 0.5)


def test_a_task_whose_score_is_no_mean_has_shares_without_intervals():
    rows = comparison()
    odd = {
        row: {**cells, "docs": cell(coins(9, 0.5), 100, score=7.0 + k)} for k, (row, cells) in enumerate(rows.items())
    }
    records = [record for record in summarise(odd, COLUMNS) if record["method"] == "divprune"]
    assert {record["task"]: record["low"] is None for record in records} == {"pope": False, "docs": True, MEAN: True}
    assert all(record["share"] is not None for record in records)


# --- hard samples


def test_hard_samples_are_right_at_full_size_and_wrong_when_resized():
    full, small = cell([1, 1, 1, 0, 0.6, 0.4]), cell([1, 0, 0.3, 0, 0.5, 0])
    assert hard.hard_samples(full, small) == {"1", "2"}


def test_hard_records_count_only_hard_samples_of_the_rows_own_budget():
    rows = {
        Row("unpruned"): {"a": cell([1, 1, 1, 1])},
        Row("resize", 0.2): {"a": cell([1, 0, 1, 0])},
        Row("random", 0.2): {"a": cell([0, 1, 0, 0])},
        Row("resize", 0.1): {"a": cell([0, 0, 0, 0])},
        Row("random", 0.1): {"a": cell([0, 1, 1, 1])},
        Row("fastv", None): {"a": cell([1, 1, 1, 1])},
    }
    records = hard.hard_records(rows, {"a": ["a"]})
    assert [(r["method"], r["keep_ratio"], r["hard"], r["right"]) for r in records] == [
        ("resize", 0.2, 2, 0.0),
        ("random", 0.2, 2, 0.5),
        ("resize", 0.1, 4, 0.0),
        ("random", 0.1, 4, 0.75),
    ]
    assert "50.0 of 2" in table.render_hard(records).text()


def test_a_budget_without_a_hard_sample_has_counts_and_no_share():
    rows = {Row("unpruned"): {"a": cell([1, 0])}, Row("resize", 0.2): {"a": cell([1, 0])}}
    (record,) = hard.hard_records(rows, {"a": ["a"]})
    assert (record["hard"], record["samples"], record["right"]) == (0, 2, None)


# --- published figures


def test_every_published_figure_has_a_known_method_a_budget_and_a_source():
    published = compare.read_published()
    assert len(published) > 50
    for figure in published:
        assert vltok.Method.from_text(figure["method"] + ",keep_ratio=0.5").name == figure["method"]
        assert 0 < figure["keep_ratio"] < 1
        assert 0 < figure["number"] <= figure["unpruned"]
        assert all(figure[name] for name in ("model", "budget", "task", "protocol", "source"))


def published(**changed):
    figure = {"method": "divprune", "model": "llava-1.5-7b", "budget": "64 of 576 tokens", "keep_ratio": 0.1111}
    figure |= {"task": "mean", "number": 94.8, "unpruned": 100.0, "positions": "reindex", "protocol": "11 sets"}
    return {**figure, "source": "a paper", **changed}


FACTS = {"model": "llava-hf/LLaVA-1.5-7b-hf", "dtype": "bfloat16", "limit": None}


def test_a_published_figure_stands_beside_the_row_of_the_nearest_budget():
    rows = comparison()
    records = summarise(rows, COLUMNS)
    (found,) = compare.compare([published()], list(rows), records, FACTS)
    own = next(r for r in records if (r["method"], r["keep_ratio"], r["task"]) == ("divprune", 0.1, MEAN))
    assert (found["share"], found["own"]) == (pytest.approx(0.948), own["share"])
    said = " | ".join(found["differs"])
    for part in ("11 sets; here pope, docs", "there reindex, here keep", "64 of 576 tokens", "bfloat16"):
        assert part in said
    text = compare.render([found]).text()
    assert "94.8" in text
    assert "1: sets: 11 sets" in text


@pytest.mark.parametrize(
    "changed", [{"keep_ratio": 0.5}, {"model": "qwen2.5-vl-7b"}, {"method": "scope"}, {"task": "x"}]
)
def test_figures_of_other_budgets_models_methods_and_tasks_are_left_out(changed):
    rows = comparison()
    assert compare.compare([published(**changed)], list(rows), summarise(rows, COLUMNS), FACTS) == []


def test_a_published_score_becomes_a_share_of_its_own_unpruned_score():
    rows = comparison()
    figure = published(task="docs", number=40.0, unpruned=80.0)
    (found,) = compare.compare([figure], list(rows), summarise(rows, COLUMNS), {**FACTS, "limit": 60})
    assert found["share"] == 0.5
    assert any("60 samples" in sentence for sentence in found["differs"])


# --- files


def test_tables_json_csv_and_pictures_say_the_same(tmp_path):
    rows = comparison()
    records = summarise(rows, COLUMNS)
    shown = table.render(records, ["a note"])
    table.write(tmp_path, "results", {"settings": {"limit": 60}}, records, [shown])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["results"] == records
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["share"]) for line in lines] == [record["share"] for record in records]
    markdown = (tmp_path / "results.md").read_text()
    assert markdown.count("\n| divprune |") == 2
    own = next(record for record in records if record["method"] == "divprune" and record["task"] == "docs")
    for text in (markdown, shown.text()):
        assert f"{100 * own['share']:.1f} ({100 * own['low']:.0f}-{100 * own['high']:.0f})" in text
        assert "a note" in text
    assert [path.name for path in plots.plot_tasks(records, tmp_path)] == ["pope.png", "docs.png", "mean.png"]


def test_the_page_names_all_sets_and_its_commands_are_understood():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("## Methods side by side")[1]
    named = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    assert {name: tuple(re.findall(r"`(\w+)`", own)) for name, own in named} == scores.TASK_SETS
    commands = re.findall(r"^python -m eval\.benchmarks (.*?[^\\])\n", section, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for words in commands:
        given = command.parser().parse_args(shlex.split(words.replace("\\\n", " ")))
        assert len(plan_rows(given.methods, given.keep)) > 10
        assert scores.parse_tasks(given.tasks)
