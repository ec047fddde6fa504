"""The benchmark of TAP and ADL compares equal things, and says whether goals are met."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eval import tap_adl


def invoke(*arguments: str):
    app = tap_adl.typer.Typer()
    app.command()(tap_adl.main)
    return CliRunner().invoke(app, arguments)


def test_both_formulations_agree():
    tap_adl.check_pooling(*tap_adl.build_pooling(6), torch.randn(2, 25, 6))


@pytest.mark.parametrize("name", ["proj.0.weight", "proj.1.bias", "proj.2.weight"])
def test_a_difference_in_one_weight_is_noticed(name):
    own, other = tap_adl.build_pooling(6)
    own.get_parameter(name).data.add_(0.1).mul_(1.1)
    with pytest.raises(RuntimeError, match="differ by"):
        tap_adl.check_pooling(own, other, torch.randn(2, 25, 6))


def test_goals_met_and_missed_are_told_apart():
    names = ("TAP, 8 x 56 x 56 x 64", "training step of a, batch 1: ADL / plain", "eval mode of a: ADL / plain")
    good = [
        tap_adl.Result(names[0], {}, 0.2, 0.25),
        tap_adl.Result(names[1], {}, 1.25),
        tap_adl.Result(names[2], {}, 9),
    ]
    assert [line.rpartition(": ")[2] for line in tap_adl.goals(good)] == ["met", "met"]
    bad = [
        tap_adl.Result(names[0], {}, 0.1, 0.3),
        tap_adl.Result(names[0], {}, 0.21, 0.1),
        tap_adl.Result(names[1], {}, 1.3),
    ]
    assert all(line.endswith("NOT MET") for line in tap_adl.goals(bad))


def test_it_measures_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(tap_adl, "MAPS", ((2, 6, 8),))
    path = tmp_path / "out.json"
    done = invoke("--model", "test_vit", "--batch", "2", "--rounds", "1", "--json", str(path))
    assert done.exit_code == 0, done.output
    results = json.loads(path.read_text())["results"]
    assert [r["what"].split(",")[0] for r in results] == [
        "TAP",
        "training step of test_vit",
        "training step of test_vit",
        "eval mode of test_vit",
    ]
    assert 0 < results[0]["memory"] < 1
    assert min(r["ratio"] for r in results) > 0
    assert invoke("--device", "tpu").exit_code == 2
