"""Which tasks of lmms-eval a set has, which of a task's figures is its score, and what a sample of it is worth."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# By their names in lmms-eval. ScienceQA and MMMU are left out: models answer most of their questions without the image.
TASK_SETS: dict[str, tuple[str, ...]] = {
    "core": ("gqa", "vqav2_val", "vizwiz_vqa_val", "mmbench_en_dev_static", "mme", "seedbench", "pope"),
    "text": ("ocrbench", "docvqa_val", "chartqa", "textvqa_val"),
    "grounding": ("refcoco_bbox_rec_val", "refcoco_bbox_rec_testA", "refcoco_bbox_rec_testB"),
    "hallucination": ("pope", "coco_cap_chair"),
    "video": ("mvbench", "videomme"),
}
# The score of a task is the first of its figures, but for these.
_SCORES = ("seed_all", "refcoco_ACC@0.5", "coco_cap_chair_s")
# Figures whose own function makes a sample's worth of one sample; others would write files or ask a judge.
_ONE_BY_ONE = _SCORES


def parse_tasks(text: str) -> list[str]:
    """The tasks of a list such as "text,pope": names of sets stand for their tasks, each is taken once."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"--tasks must name sets ({', '.join(TASK_SETS)}) or tasks of lmms-eval, got {text!r}")
    return list(dict.fromkeys(task for name in names for task in TASK_SETS.get(name, (name,))))


def choose_metric(figures: Sequence[str], results: Mapping[str, Any]) -> tuple[str, str]:
    """The figure that is a task's score, and the filter of answers it was computed behind.

    Args:
        figures: The task's figures in its own order.
        results: What lmms-eval gave, by "figure,filter".

    Raises:
        ValueError: If none of them is a number.
    """
    for figure in sorted(figures, key=lambda name: name not in _SCORES):  # stable: else in their order
        for key, value in results.items():
            name, _, answers = key.partition(",")
            if name == figure and isinstance(value, int | float) and math.isfinite(value):
                return figure, answers
    raise ValueError(f"none of the figures {', '.join(figures)} is a number: {dict(results)}")


def sample_values(
    samples: Sequence[Mapping[str, Any]], metric: str, aggregate: Callable[[list[Any]], float]
) -> dict[str, float] | None:
    """What each sample is worth to a metric, by the sample's number as text; None where that can't be told.

    Args:
        samples: As lmms-eval logs them. A sample that came through several filters counts with the first.
        metric: A figure of the task; samples without it are left out.
        aggregate: Makes the figure of several samples.
    """
    values: dict[str, float] = {}
    for sample in samples:
        key = str(sample["doc_id"])
        if metric not in sample or key in values:
            continue
        item = sample[metric]
        if isinstance(item, bool | int | float):
            values[key] = float(item)
        elif metric in _ONE_BY_ONE:
            values[key] = float(aggregate([item]))
        elif isinstance(item, Mapping) and isinstance(item.get("score"), bool | int | float):
            values[key] = float(item["score"])
        else:
            return None
    if values and max(values.values()) > 1:  # in %
        values = {key: value / 100 for key, value in values.items()}
    return values or None
