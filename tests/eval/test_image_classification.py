"""`python -m eval.image_classification` as a command: tables, files, going on, starting from trained models."""

import json
from functools import partial

import commands
import numpy as np
import pytest
from safetensors.torch import load_file

from eval.image_classification import __main__ as command
from eval.image_classification import report

MODEL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    "img_size=16,patch_size=4,embed_dim=16,depth=1,num_heads=2",
]
BUDGET = ["--steps", "4", "--batch-size", "8", "--eval-every", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    labels = np.arange(40) % 7
    images = (20 * labels[:, None, None] + random.integers(0, 60, (40, 16, 16))).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, train_images=images[:26], train_labels=labels[:26], test_images=images[26:], test_labels=labels[26:])
    return path


call, refused = partial(commands.call, command), partial(commands.refused, command)


ARMS = ["--arm", "softmax=", "--arm", "soft=soft,ratio=2", "--seeds", "0,1"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder with two arms of two seeds."""
    out = tmp_path_factory.mktemp("out")
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--out", out)
    return out


def test_the_table_and_the_json_hold_every_arm_and_seed(finished):
    results = json.loads((finished / "results.json").read_text())
    named = [("softmax", 0), ("soft", 0), ("softmax", 1), ("soft", 1)]  # arms in turns, seed after seed
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == named
    printed = (finished / "results.md").read_text()
    for run in results["runs"]:
        assert [point["step"] for point in run["curve"]] == [2, 4]
        assert run["tested"] == 14 and 0 <= run["top1"] <= run["top5"] <= 1
        weights = load_file(finished / run["weights"])
        assert sum(value.numel() for value in weights.values()) == run["parameters"]
    for row, runs in zip(results["arms"], (results["runs"][::2], results["runs"][1::2]), strict=True):
        values = [run["top1"] for run in runs]
        assert row["top1"]["values"] == values and row["top1"]["mean"] == pytest.approx(np.mean(values))
        assert row["top1"]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.2f}" in printed
    assert "soft(ratio=2)" in printed and "top-5 %" in printed and "14 test pictures, 26 training" in printed


def test_a_second_call_makes_what_is_missing_and_nothing_else(finished, data, monkeypatch):
    before = {path.name: path.read_text() for path in (finished / "runs").glob("*.json")}
    lost = next((finished / "runs").glob("soft-seed1-*.json"))
    lost.unlink()
    made, fit = [], command.fit
    monkeypatch.setattr(command, "fit", lambda *a, **k: made.append(a[4]) or fit(*a, **k))
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--out", finished)
    again, first = json.loads(lost.read_text()), json.loads(before[lost.name])
    assert made == [1] and again["result"]["curve"] == first["result"]["curve"]
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--arm", "third=", "--out", finished)
    assert made == [1, 0, 1]
    runs = {(run["arm"], run["seed"]): run for run in json.loads((finished / "results.json").read_text())["runs"]}
    assert runs["third", 0]["curve"] == runs["softmax", 0]["curve"]  # the name decides nothing
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--lr", "0.01", "--out", finished)
    assert made == [1, 0, 1, 0, 0, 1, 1]  # other settings are other runs
    assert all((finished / "runs" / name).read_text() == text for name, text in before.items() if name != lost.name)


def test_trained_weights_are_tested_as_they_were_left(finished, data):
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--out", finished)
    trained = json.loads((finished / "results.json").read_text())["runs"]
    for run in trained[1::2]:
        arms = ["--arm", f"soft@{finished}/{run['weights']}=soft,ratio=2", "--seeds", run["seed"]]
        call("--data", data, *MODEL, *arms, "--eval-only", "--out", finished)
        (tested,) = json.loads((finished / "evaluation.json").read_text())["runs"]
        assert tested["top1"] == run["top1"] and tested["loss"] == pytest.approx(run["loss"], rel=1e-6)


def test_an_arm_starts_from_the_trained_arm_it_names(data, tmp_path):
    arms = ["--arm", "plain=", "--arm", "soft@plain=soft,ratio=2", "--arm", "more@plain=", "--seeds", "3"]
    tuning = ["--finetune-steps", "2", "--finetune-lr", "1e-6", "--distill", "0.5"]
    call("--data", data, *MODEL, *BUDGET, *arms, *tuning, "--out", tmp_path / "a")
    runs = {run["arm"]: run for run in json.loads((tmp_path / "a/results.json").read_text())["runs"]}
    assert [point["step"] for point in runs["more"]["curve"]] == [0, 2]
    assert [point["step"] for point in runs["plain"]["curve"]] == [2, 4]
    assert runs["more"]["curve"][0]["loss"] == runs["plain"]["loss"] != runs["soft"]["curve"][0]["loss"]
    assert runs["soft"]["top1_before"] == runs["soft"]["curve"][0]["top1"]
    recipes = {name: run["settings"]["recipe"] for name, run in runs.items()}
    assert (recipes["soft"]["lr"], recipes["soft"]["distill"]) == (1e-6, 0.5)
    assert (recipes["plain"]["lr"], recipes["plain"]["distill"]) == (1e-3, 0)
    assert "at start" in (tmp_path / "a/results.md").read_text()
    start = f"{tmp_path}/a/runs/plain-seed{{seed}}-*.safetensors"
    arms = ["--arm", "soft=soft,ratio=2", "--start-from", start, "--seeds", "3"]
    call("--data", data, *MODEL, *BUDGET, *arms, *tuning, "--out", tmp_path / "b")
    (run,) = json.loads((tmp_path / "b/results.json").read_text())["runs"]
    assert run["curve"] == runs["soft"]["curve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-only", "--arm", "a="], "--eval-only tests trained weights"),
        (["--arm", "soft"], "an arm is written"),
        (["--arm", "a=soft,ratio=9"], "at most 4"),
        (["--model", "vit_tinny"], "timm has no model"),
        (["--batch-size", "27"], "there are 26"),
        (["--weights", "none.pth"], "there is no file of weights none.pth"),
        (["--optimizer", "adamx"], "can't make the optimizer"),
        (["--test", "none.npz"], "neither a folder nor a file"),
        (["--model-kwargs", "num_classes=3"], "7 classes, the model 3"),
    ],
)
def test_wrong_options_are_explained(data, tmp_path, arguments, message):
    assert message in refused("--data", data, *MODEL, *BUDGET, "--out", tmp_path, *arguments)
    assert not list(tmp_path.rglob("*.json"))


def test_the_quick_mode_trains_the_default_arms_on_digits(tmp_path):
    call("--quick", "--epochs", "0.05", "--finetune-epochs", "0.05", "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["softmax", "soft", "tap", "adl", "tuned"]
    assert {run["tested"] for run in runs} == {360} and runs[-1]["top1_before"] is not None


def test_five_classes_have_no_top_five_and_one_seed_no_deviation():
    record = {"arm": "a", "start": None, "methods": "-", "seed": 0, "parameters": 5, "top1": 0.5, "loss": 1.0}
    (row,) = report.summarise([record])
    assert row["top5"] is None and row["top1"] == {"mean": 0.5, "deviation": None, "values": [0.5]}
    assert row["images_per_second"] is None and row["top1_before"] is None
