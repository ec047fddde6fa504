"""`python -m eval.image_classification` as a command: tables, files, going on, starting from trained models."""

import json
import re

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from eval.image_classification import bench, report
from eval.image_classification.__main__ import app
from eval.image_classification.arms import Arm

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


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


ARMS = ["--arm", "softmax=", "--arm", "soft=soft,ratio=2", "--seeds", "0,1"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder with two arms of two seeds, and what was printed."""
    out = tmp_path_factory.mktemp("out")
    return out, call("--data", data, *MODEL, *BUDGET, *ARMS, "--out", out)


def test_the_table_and_the_json_hold_every_arm_and_seed(finished):
    out, printed = finished
    results = json.loads((out / "results.json").read_text())
    assert [(run["settings"]["arm"]["name"], run["seed"]) for run in results["runs"]] == [
        ("softmax", 0),
        ("softmax", 1),
        ("soft", 0),
        ("soft", 1),
    ]
    for run in results["runs"]:
        assert [point["step"] for point in run["curve"]] == [2, 4]
        assert run["tested"] == 14 and 0 <= run["top1"] <= run["top5"] <= 1
        weights = load_file(out / "runs" / f"{run['settings']['arm']['name']}-seed{run['seed']}.safetensors")
        assert sum(value.numel() for value in weights.values()) == run["parameters"]
    for row, runs in zip(results["arms"], (results["runs"][:2], results["runs"][2:]), strict=True):
        values = [run["top1"] for run in runs]
        assert row["top1"]["values"] == values and row["top1"]["mean"] == pytest.approx(np.mean(values))
        assert row["top1"]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.2f}" in printed
    assert "soft(ratio=2)" in printed and "top-5 %" in printed and "14 test pictures, 26 training" in printed
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_makes_what_is_missing_and_nothing_else(finished, data, monkeypatch):
    out, _ = finished
    before = {path.name: path.read_text() for path in (out / "runs").glob("*.json")}
    (out / "runs" / "soft-seed1.json").unlink()
    made = []
    fit = bench.fit
    monkeypatch.setattr(
        bench,
        "fit",
        lambda model, handle, task, recipe, seed, **k: made.append(seed) or fit(model, handle, task, recipe, seed, **k),
    )
    printed = call("--data", data, *MODEL, *BUDGET, *ARMS, "--out", out)
    assert made == [1] and "3 finished runs" in printed
    again, first = json.loads((out / "runs" / "soft-seed1.json").read_text()), json.loads(before["soft-seed1.json"])
    assert again["curve"] == first["curve"] and again["settings"] == first["settings"]
    call("--data", data, *MODEL, *BUDGET, *ARMS, "--arm", "third=", "--out", out)
    assert made == [1, 0, 1]
    third = json.loads((out / "runs" / "third-seed0.json").read_text())
    assert third["curve"] == json.loads(before["softmax-seed0.json"])["curve"]  # the name decides nothing
    assert {path.name: path.read_text() for path in (out / "runs").glob("softmax*.json")} == {
        name: text for name, text in before.items() if name.startswith("softmax")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "0.01"], "recipe.lr was 0.001, is 0.01"),
        (["--augment", "none"], "pictures.augment.kind was 'crop-flip', is 'none'"),
        (["--holdout", "0.3"], "pictures.test was"),
        (["--eval-every", "3"], "eval_every was 2, is 3"),
        (["--arm", "soft=soft,ratio=4"], "arm.methods.0.ratio was 2, is 4"),
        (["--model-kwargs", "img_size=16,patch_size=8"], "model.kwargs.patch_size was 4, is 8"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(finished, data, change, message):
    out, _ = finished
    arms = ARMS[:2] + ARMS[4:] if "--arm" in change else ARMS
    printed = call("--data", data, *MODEL, *BUDGET, *arms, "--out", out, *change, code=1)
    assert message in printed and "other settings" in printed and "Traceback" not in printed


def test_trained_weights_are_tested_as_they_were_left(finished, data):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    weights = f"{out}/runs/{{arm}}-seed{{seed}}.safetensors"
    printed = call("--data", data, *MODEL, *ARMS, "--eval-only", "--weights", weights, "--out", out, "--device", "cpu")
    tested = json.loads((out / "evaluation.json").read_text())
    for run, trained in zip(tested["runs"], results["runs"][:4], strict=True):
        assert run["top1"] == trained["top1"] and run["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert "images/s" not in printed
    assert json.loads((out / "results.json").read_text()) == results


def test_an_arm_starts_from_the_trained_arm_it_names(data, tmp_path):
    arms = ["--arm", "soft@plain=soft,ratio=2", "--arm", "plain=", "--arm", "more@plain=", "--seeds", "3"]
    tuning = ["--finetune-steps", "2", "--finetune-lr", "1e-6", "--distill", "0.5", "--distill-features", "0.1"]
    printed = call("--data", data, *MODEL, *BUDGET, *arms, *tuning, "--out", tmp_path / "a")
    runs = {
        run["settings"]["arm"]["name"]: run for run in json.loads((tmp_path / "a/results.json").read_text())["runs"]
    }
    assert [point["step"] for point in runs["more"]["curve"]] == [0, 2] and runs["plain"]["steps"] == 4
    assert runs["more"]["curve"][0]["loss"] == runs["plain"]["loss"]
    assert runs["soft"]["curve"][0]["loss"] != runs["plain"]["loss"]
    assert runs["more"]["settings"]["start"] == runs["plain"]["settings"]
    assert runs["soft"]["settings"]["recipe"]["lr"] == 1e-6 and runs["plain"]["settings"]["recipe"]["lr"] == 1e-3
    assert runs["soft"]["settings"]["distillation"]["weight"] == 0.5 and "distillation" not in runs["plain"]["settings"]
    assert "at start" in printed

    start = f"{tmp_path}/a/runs/plain-seed{{seed}}.safetensors"
    arms = ["--arm", "soft=soft,ratio=2", "--start-from", start, "--seeds", "3"]
    call("--data", data, *MODEL, *BUDGET, *arms, *tuning, "--out", tmp_path / "b")
    (run,) = json.loads((tmp_path / "b/results.json").read_text())["runs"]
    assert run["curve"] == runs["soft"]["curve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-only"], "--eval-only tests trained weights"),
        (["--new-head"], "--new-head is for"),
        (["--arm", "soft"], "an arm is written"),
        (["--arm", "a=sift"], "unknown method 'sift'"),
        (["--arm", "a=soft,ratio=9"], "at most 4"),
        (["--model", "vit_tinny"], "timm has no model"),
        (["--epochs", "1"], "either epochs or steps"),
        (["--seeds", "x"], "seeds are different whole numbers"),
        (["--batch-size", "27"], "there are 26"),
        (["--distill", "1.5"], "share of distillation"),
        (["--weights", "none.pth"], "there is no file of weights none.pth"),
        (["--device", "nowhere"], "error:"),
        (["--optimizer", "adamx"], "can't make the optimizer"),
        (["--test", "none.npz"], "neither a folder nor a file"),
        (["--model-kwargs", "num_classes=3"], "more than the model's 3"),
    ],
)
def test_wrong_options_are_explained(data, tmp_path, arguments, message):
    printed = call("--data", data, *MODEL, *BUDGET, "--out", tmp_path, *arguments, code=1)
    assert printed.count("error:") == 1 and message in printed
    assert not list(tmp_path.rglob("*.json"))


def test_help_names_every_group():
    printed = re.sub(r"\x1b\[[0-9;]*m", "", call("--help"))
    for group in ("Pictures", "Model", "Arms: what is compared", "Training", "trained model", "Run"):
        assert group in printed


def test_five_classes_have_no_top_five_and_one_seed_no_deviation():
    record = {"seed": 0, "parameters": 5, "top1": 0.5, "loss": 1.0}
    (row,) = report.summarise([Arm("a")], {"a": [record]})
    assert row["top5"] is None and row["top1"] == {"mean": 0.5, "deviation": None, "values": [0.5]}
    assert row["images_per_second"] is None and row["top1_before"] is None
