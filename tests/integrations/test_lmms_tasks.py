"""The tasks that need no network ask about what their pictures show, and lmms-eval scores answers to them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.canvas.data import NUMBERS, PHOTOS, SIZE, Canvases
from eval.canvas.model import MODEL_DIR

pytest.importorskip("lmms_eval")
import datasets
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from eval.benchmarks import local

# What each task is scored by, and what of it an oracle gets.
SCORES = {
    "canvas_boxes": ("refcoco_IoU", "refcoco_ACC@0.9"),
    "canvas_ocr": ("anls",),
    "canvas_pope": ("pope_accuracy", "pope_f1_score"),
    "canvas_vqa": ("exact_match",),
}
CANVASES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """The tasks, written."""
    path = tmp_path_factory.mktemp("tasks")
    assert local.build(path, canvases=CANVASES) == sorted(SCORES)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Leave nothing in the cache of the machine."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def scores(folder: Any, model: Any, **given: Any) -> dict[str, Any]:
    """What lmms-eval makes of a model's answers: each score of each task."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=list(SCORES), task_manager=manager, bootstrap_iters=0, **given)
    return {
        "throughput": found.get("throughput"),
        **{(task, name): found["results"][task][f"{name},none"] for task, names in SCORES.items() for name in names},
    }


class Oracle(lmms):
    """Answers rightly, or never."""

    def __init__(self, knows: bool, folder: Any) -> None:
        super().__init__()
        self.knows = knows
        rows = datasets.Dataset.from_parquet(str(folder / "canvas_boxes.parquet"))
        self.boxes = dict(zip(rows["question_id"], rows["bbox"], strict=True))

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        return [GenerationResult(self.answer(*request.args[3:]) if self.knows else "nothing") for request in requests]

    def answer(self, doc_id: int, task: str, split: str) -> str:
        doc = self.task_dict[task][split][doc_id]
        if "bbox" in doc:
            left, top, width, height = self.boxes[doc["question_id"]]
            box = np.array([left, top, left + width, top + height]) / SIZE
            return f"It is at {box.round(4).tolist()}."
        return doc["answer"] if "answer" in doc else doc["answers"][1]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("knows", [True, False])
def test_right_answers_score_one_and_others_zero(knows, folder):
    found = scores(folder, Oracle(knows, folder))
    del found["throughput"]
    assert found == {key: pytest.approx(float(knows), abs=0.001) for key in found}


def test_the_trained_model_is_scored_with_a_method_and_without(folder):
    given = {"batch_size": 8, "device": "cpu"}
    whole = scores(folder, "vltok_llava_hf", model_args=f"pretrained={MODEL_DIR},dtype=float32", **given)
    method = "method=random;keep_ratio=0.05"
    pruned = scores(folder, "vltok_llava_hf", model_args=f"pretrained={MODEL_DIR},dtype=float32,{method}", **given)
    readable = [("canvas_ocr", "anls"), ("canvas_pope", "pope_accuracy"), ("canvas_vqa", "exact_match")]
    assert all(whole[key] > 0.8 for key in readable)
    assert sum(pruned[key] for key in readable) < sum(whole[key] for key in readable) - 0.5
    assert (whole["throughput"]["avg_visual_tokens"], whole["throughput"]["avg_kept_tokens"]) == (256, 256)
    assert (pruned["throughput"]["avg_visual_tokens"], pruned["throughput"]["avg_kept_tokens"]) == (256, 13)


def test_a_request_that_fails_ends_the_run(folder, monkeypatch):
    lm = get_model("vltok")(pretrained=MODEL_DIR, device="cpu")

    def generate(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(lm.model, "generate", generate)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(RuntimeError, match="no answer to document 0 of task canvas_pope: MemoryError: no room"):
        simple_evaluate(lm, tasks=["canvas_pope"], task_manager=manager, limit=1)


def test_questions_are_those_of_the_canvases(folder):
    source = Canvases("test", 0)
    expected = [
        (question.text, question.answer)
        for index in range(CANVASES)
        for question in source.questions(index)
        if question.kind in ("where", "count")
    ]
    rows = datasets.Dataset.from_parquet(str(folder / "canvas_vqa.parquet"))
    assert [(row["question"], row["answer"]) for row in rows] == expected
    assert np.array_equal(np.asarray(rows[0]["image"]), source.canvas(0).image)
    assert isinstance(rows[0]["image"], Image.Image)


def test_boxes_hold_their_digit(folder):
    source = Canvases("test", 0)
    rows = datasets.Dataset.from_parquet(str(folder / "canvas_boxes.parquet"))
    drawn = {json.dumps([*map(int, box)]): int(label) for n in range(CANVASES) for box, label in on(source.canvas(n))}
    for row in rows:
        left, top, width, height = row["bbox"]
        assert drawn[json.dumps([left, top, left + width, top + height])] == NUMBERS.index(row["answer"][0].split()[1])


def on(canvas: Any) -> Any:
    return zip(canvas.boxes, canvas.labels, strict=True)


def test_every_photo_is_credited(folder):
    told = (folder / "credits.txt").read_text()
    assert all(name in told and credit in told for name, (_, credit) in PHOTOS.items())
    assert "CC BY 4.0" in told
