"""The benchmarks of TAP, ADL and ToMe compare equal things, and say whether goals are met."""

from __future__ import annotations

import json

import pytest
import torch

from eval import towers


def test_both_formulations_agree():
    towers.check_pooling(*towers.build_pooling(6), torch.randn(2, 25, 6))


@pytest.mark.parametrize("name", ["proj.0.weight", "proj.1.bias", "proj.2.weight"])
def test_a_difference_in_one_weight_is_noticed(name):
    own, other = towers.build_pooling(6)
    own.get_parameter(name).data.add_(0.1).mul_(1.1)
    with pytest.raises(RuntimeError, match="differ by"):
        towers.check_pooling(own, other, torch.randn(2, 25, 6))


def result(what: str, ratio: float, memory: float | None = None) -> towers.Result:
    return {"what": what, "milliseconds": {}, "ratio": ratio, "memory": memory}


def test_goals_met_and_missed_are_told_apart():
    names = ("TAP, 8 x 56 x 56 x 64", "training step of a, batch 1: ADL / plain", "eval mode of a: ADL / plain")
    good = [result(names[0], 0.2, 0.25), result(names[1], 1.25), result(names[2], 9)]
    assert [line.rpartition(": ")[2] for line in towers.goals(good)] == ["met", "met"]
    bad = [result(names[0], 0.1, 0.3), result(names[0], 0.21, 0.1), result(names[1], 1.3)]
    assert all(line.endswith("NOT MET") for line in towers.goals(bad))


def test_it_measures_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(towers, "MAPS", ((2, 6, 8),))
    path = tmp_path / "out.json"
    towers.main(["--model", "test_vit", "--batch", "2", "--rounds", "1", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [r["what"].rpartition(": ")[2] for r in results] == [
        "TAP, 2 x 6 x 6 x 8",
        "ADL / plain",
        "unfused / plain",
        "ADL / plain",
    ]
    assert 0 < results[0]["memory"] < 1
    assert min(r["ratio"] for r in results) > 0


def test_merging_leaves_r_patches_fewer_after_every_block(tmp_path, capsys):
    path = tmp_path / "out.json"
    small = ["--merging", "--model", "test_vit", "--merges", "1,7", "--batch", "2", "--rounds", "1"]
    towers.main([*small, "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [each["r"] for each in results] == [0, 1, 7]
    before = results[0]["patches"]
    depth = before - results[1]["patches"]
    assert depth > 1 and results[2]["patches"] == before - 7 * depth
    assert results[0]["faster"] == 1 and min(each["pictures_per_second"] for each in results) > 0
    assert "times as fast" in capsys.readouterr().out
