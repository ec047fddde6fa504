"""eval.benchmarks through lmms-eval, offline: tiny random models, and tasks whose answers they give now and then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, QWEN2_5_VL, picture

import vltok

pytest.importorskip("lmms_eval")
import datasets
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from eval.benchmarks import __main__ as command
from eval.benchmarks import harness
from eval.benchmarks.local import tasks_of_lmms_eval
from eval.benchmarks.plan import fingerprint
from eval.benchmarks.scores import TASK_SETS, sample_values
from vltok.integrations.lmms_eval.model import Vltok

ROWS = {row.key: row for row in (LLAVA, QWEN2_5_VL, INTERNVL)}
TASKS = {"tiny_docs": ("docvqa/docvqa_val.yaml", "anls"), "tiny_vqa": ("vqav2/vqav2_val.yaml", "exact_match")}
COUNT, WORDS, RATIO = 8, 3, 0.5
YAML = """\
task: {task}
include: {shipped}
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    validation: {task}.parquet
generation_kwargs:
  max_new_tokens: {words}
  do_sample: false
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What datasets make of parquet files goes to a folder that is thrown away."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """For a family, a folder with a model and one with tasks, half of whose answers the unpruned model gives."""
    made = {}

    def make(row):
        if row.key not in made:
            model, tasks = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tasks")
            row.model().save_pretrained(model)
            row.processor().save_pretrained(model)
            sizes = [tuple(2 * side for side in size) for size in (row.size, row.other_size)]
            questions = [f"w{k} w{k + 7} w{3 * k}" for k in range(COUNT)]
            pictures = [picture(k, sizes[k % 2]) for k in range(COUNT)]
            write_tasks(tasks, questions, pictures, ["w0"] * COUNT)
            said = evaluate(model, tasks, "tiny_docs")["samples"]["tiny_docs"]
            given = [sample["filtered_resps"][0] for sample in sorted(said, key=lambda sample: sample["doc_id"])]
            write_tasks(tasks, questions, pictures, [w if k % 2 else f"w0 {w}" for k, w in enumerate(given)])
            made[row.key] = model, tasks
        return made[row.key]

    return make


def write_tasks(folder, questions, pictures, targets):
    rows = [
        {"questionId": str(k), "question_id": str(k), "question": each, "image": seen, "answer": target}
        | {"answers": [{"answer": target}] * 10}
        for k, (each, seen, target) in enumerate(zip(questions, pictures, targets, strict=True))
    ]
    for task, (shipped, _) in TASKS.items():
        own = [{**row, "answers": [row["answer"]]} for row in rows] if task == "tiny_docs" else rows
        datasets.Dataset.from_list(own).to_parquet(folder / f"{task}.parquet")
        text = YAML.format(task=task, shipped=tasks_of_lmms_eval() / shipped, words=WORDS)
        (folder / f"{task}.yaml").write_text(text)


def arguments(model, tasks, out, *more):
    """The command line of a small comparison."""
    given = {"model": model, "methods": "divprune", "keep": RATIO, "tasks": ",".join(TASKS), "include-path": tasks}
    given |= {"device": "cpu", "model-args": "dtype=float32", "out": out}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def evaluate(model, tasks, task, method=None, ratio=None):
    """What lmms-eval alone gives."""
    lm = Vltok(pretrained=model, device="cpu", dtype="float32", method=method)
    if ratio is not None:
        vltok.resize(lm.processor, ratio)
    manager = TaskManager("ERROR", str(tasks), include_defaults=False)
    return simple_evaluate(lm, tasks=[task], task_manager=manager, batch_size=1, bootstrap_iters=0)


def by_hand(model, tasks, task, **given):
    """The score and the worth of samples, by lmms-eval alone."""
    results, metric = evaluate(model, tasks, task, **given), TASKS[task][1]
    samples = {str(sample["doc_id"]): sample[metric] for sample in results["samples"][task]}
    return results["results"][task][f"{metric},none"], samples


def cells_of(out):
    """Finished cells by name."""
    found = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    return {cell["name"]: cell["result"] for cell in found}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_scores_are_those_of_lmms_eval_called_by_hand(row, site, tmp_path, capsys):
    model, tasks = site(row)
    more = ("--hard-subset",) if row is QWEN2_5_VL else ()
    assert command.main(arguments(model, tasks, tmp_path, *more)) == 0
    cells = cells_of(tmp_path)
    rows = {"unpruned": {}, f"divprune {100 * RATIO:g} %": {"method": f"divprune;keep_ratio={RATIO}"}}
    if f"tiny_docs resize {100 * RATIO:g} %" in cells:
        rows[f"resize {100 * RATIO:g} %"] = {"ratio": RATIO}
    for name, given in rows.items():
        for task in TASKS:
            score, samples = by_hand(model, tasks, task, **given)
            assert cells[f"{task} {name}"]["score"] == pytest.approx(score, abs=1e-12)
            assert cells[f"{task} {name}"]["values"] == pytest.approx(samples, abs=1e-12)
    scores = {name: cell["score"] for name, cell in cells.items() if name.startswith("tiny_docs")}
    assert len({*scores.values()}) > 2  # methods differ, or nothing was compared
    assert scores["tiny_docs unpruned"] >= 0.5
    results = json.loads((tmp_path / "results.json").read_text())
    shares = {(r["method"], r["task"]): r["share"] for r in results["results"]}
    assert shares["divprune", "tiny_docs"] == scores["tiny_docs divprune 50 %"] / scores["tiny_docs unpruned"]
    kept = {r["method"]: (r["visual_tokens"], r["kept_tokens"]) for r in results["results"] if r["task"] == "tiny_docs"}
    assert kept["unpruned"][0] == kept["unpruned"][1] == kept["divprune"][0] > kept["divprune"][1]
    assert "divprune" in capsys.readouterr().out
    if row is QWEN2_5_VL:
        hard = [each for each in results["hard"] if each["method"] == "resize"]
        assert [each["right"] for each in hard if each["hard"]] == [0.0] * sum(each["hard"] > 0 for each in hard)
    else:
        assert row is INTERNVL or any("No row for resize" in note for note in results["notes"])


KILLED = """
import os, signal, sys
from eval.benchmarks import __main__ as command, harness
asked, answer = [], harness.Bench.run
def run(bench, task):
    asked.append(task)
    if len(asked) == 2:  # in the middle of the second cell
        whole, count = bench.lm._answer, []
        def die(*given):
            count.append(given)
            return os.kill(os.getpid(), signal.SIGKILL) if len(count) == 3 else whole(*given)
        bench.lm._answer = die
    return answer(bench, task)
harness.Bench.run = run
sys.exit(command.main(sys.argv[1:]))
"""


def test_after_a_kill_within_a_cell_only_that_cell_and_later_ones_run(site, tmp_path, monkeypatch):
    model, tasks = site(LLAVA)
    given = arguments(model, tasks, tmp_path / "out")
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(vltok.__file__).parents[1]), *sys.path])
    killed = subprocess.run([sys.executable, "-c", KILLED, *given], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert list(cells_of(tmp_path / "out")) == ["tiny_docs unpruned"]
    assert not list((tmp_path / "out").glob("results.*"))

    asked, whole = [], harness.Bench.run
    monkeypatch.setattr(harness.Bench, "run", lambda bench, task: asked.append(task) or whole(bench, task))
    (first,) = (tmp_path / "out" / "cells").iterdir()
    written = first.stat().st_mtime_ns
    assert command.main(given) == 0
    cells = cells_of(tmp_path / "out")
    assert len(asked) == len(cells) - 1
    assert asked[0] == "tiny_vqa"
    assert first.stat().st_mtime_ns == written
    assert command.main(arguments(model, tasks, tmp_path / "fresh")) == 0
    assert cells_of(tmp_path / "fresh") == cells

    asked.clear()
    assert command.main(given) == 0
    assert asked == []  # a third call reads everything


def test_a_sample_that_fails_ends_the_run_by_name_and_finished_cells_stay(site, tmp_path, capsys):
    model, tasks = site(QWEN2_5_VL)
    broken = tmp_path / "tasks"
    pictures = [picture(k, (64, 48)) for k in range(COUNT)]
    pictures[5] = Image.new("RGB", (4, 1200))  # its processor takes no picture of such a shape
    write_tasks(broken, [f"w{k}" for k in range(COUNT)], pictures, ["w1"] * COUNT)
    (broken / "tiny_docs.parquet").write_bytes((tasks / "tiny_docs.parquet").read_bytes())
    assert command.main(arguments(model, broken, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "error: unpruned, tiny_vqa: no answer to document 5 of task tiny_vqa" in said
    assert "aspect ratio" in said
    assert list(cells_of(tmp_path / "out")) == ["tiny_docs unpruned"]


def test_a_floor_that_images_refuse_is_left_out_and_the_others_are_compared(site, tmp_path):
    model, tasks = site(LLAVA_NEXT)  # its visual tokens form no grid to pool
    assert command.main(arguments(model, tasks, tmp_path, "--limit", "2", "--tasks", "tiny_vqa")) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    names = {record["method"] for record in results["results"]}
    assert {"unpruned", "random", "stride", "divprune"} <= names
    assert "pool" not in names
    (note,) = [note for note in results["notes"] if "pool" in note]
    assert "document 0 of task tiny_vqa" in note
    assert "form none that is known" in note


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tasks", "nothing_of_the_kind"), "knows no task 'nothing_of_the_kind'"),
        (("--methods", "divprun"), "did you mean 'divprune'"),
        (("--methods", "average_pool;scale_factor=3"), "average_pool;scale_factor=3: "),
        (("--hard-subset",), "compares with resized images"),
        (("--backend", "nobody"), "vltok_llava_hf"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_answered(site, tmp_path, capsys, more, said):
    model, tasks = site(LLAVA)
    assert command.main(arguments(model, tasks, tmp_path, *more)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()


def test_changed_data_is_another_task(site, tmp_path):
    _, tasks = site(LLAVA)
    before = harness.Tasks(["tiny_docs"], "vltok", tasks).settings("tiny_docs")
    for path in tasks.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_tasks(tmp_path, ["w1"], [picture(1)], ["w2"])
    after = harness.Tasks(["tiny_docs"], "vltok", tmp_path).settings("tiny_docs")
    assert before["task"] == after["task"]
    assert before["task_digest"] != after["task_digest"]


def test_another_batch_size_is_another_cell(site):
    model, _ = site(LLAVA)
    first, second = (harness.Setup(str(model), batch_size=size).settings(fingerprint(str(model))) for size in (1, 2))
    assert first != second


@pytest.fixture(scope="module")
def shipped():
    """All sets, looked up among what lmms-eval ships."""
    return harness.Tasks([name for names in TASK_SETS.values() for name in names], "vltok", None)


def test_all_sets_are_tasks_of_the_installed_lmms_eval(shipped):
    assert all(shipped.columns.values())
    assert len(shipped.columns["mvbench"]) == 20
    assert all(shipped.figures(leaves[0]) for leaves in shipped.columns.values())


@pytest.mark.parametrize(
    ("task", "metric", "items"),
    [
        ("seedbench", "seed_all", [{"pred": "A", "answer": "a"}, {"pred": "B", "answer": "A"}]),
        (
            "refcoco_bbox_rec_val",
            "refcoco_ACC@0.5",
            [{"bbox": [0, 0, 4, 4], "pred": [0, 0, 4, 4 - k]} for k in range(4)],
        ),
        ("coco_cap_chair", "coco_cap_chair_s", [{"answer": ["cat"], "pred": ["cat"] + ["dog"] * k} for k in range(3)]),
    ],
)
def test_samples_worth_one_by_one_have_the_tasks_own_score_as_their_mean(task, metric, items, shipped):
    figure = shipped.figures(task)[metric]
    samples = [{"doc_id": k, metric: item} for k, item in enumerate(items)]
    values = sample_values(samples, metric, figure["aggregation"])
    whole = figure["aggregation"](items)
    assert len({*values.values()}) == 2
    assert sum(values.values()) / len(values) == pytest.approx(whole / (100 if whole > 1 else 1))


def test_a_group_of_unnamed_tasks_is_refused(tmp_path):
    (tmp_path / "group.yaml").write_text("group: mine\ntask:\n  - task: pope\n    num_fewshot: 0\n")
    with pytest.raises(ValueError, match="name single tasks"):
        harness.Tasks(["mine"], "vltok", tmp_path)
