"""The overhead benchmark compares like with like: the sides give equal answers, and a difference would be noticed."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eval import overhead

SHAPE = overhead.Shape(layers=2, width=64, visual_tokens=16, text_tokens=8, keep_ratio=0.25, decode_steps=3)


@pytest.fixture(scope="module")
def bench() -> overhead.Bench:
    return overhead.Bench(SHAPE, torch.float32, "cpu")


def test_the_native_side_gets_the_text_and_the_kept_tokens(bench):
    assert bench.kept.shape == (1, 4)
    assert bench.short.shape == (1, 8 + 4, 64)
    with overhead.vltok.apply(bench.model, overhead.vltok.ToDRE(keep_ratio=0.25, relevance=False)) as handle:
        bench.whole()
        report = handle.report(file=None)
    assert torch.equal(report.keep_indices[0][0], bench.kept[0])
    assert report.kv_entries == [12, 12]


def test_both_sides_give_the_same_answer(bench):
    bench.check()


def test_a_native_side_with_other_tokens_is_noticed(bench, monkeypatch):
    monkeypatch.setattr(bench, "short", 3 * bench.short.flip(1))
    with pytest.raises(RuntimeError, match="the sides differ"):
        bench.check()


def test_every_side_makes_the_same_number_of_steps(bench):
    assert bench.native().sequences.shape == (1, 4)
    assert bench.whole().sequences.shape == (1, 16 + 8 + 4)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    app = overhead.typer.Typer()
    app.command()(overhead.main)
    small = ["--layers", "1", "--width", "64", "--visual-tokens", "16", "--rounds", "2"]
    done = CliRunner().invoke(app, [*small, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["shape"]["visual_tokens"] == 16
    assert written["results"][0]["side"] == "pruning, selection taken out"
    assert all(result["ratio"] > 0 for result in written["results"])
    assert "not pruned" in done.output


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--visual-tokens", "10"]], ids=" ".join)
def test_a_setting_out_of_range_is_refused(arguments):
    app = overhead.typer.Typer()
    app.command()(overhead.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert arguments[1] in done.output
