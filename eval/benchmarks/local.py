"""Tasks for lmms-eval that need no network: questions about canvases of handwritten digits on photos.

    python -m eval.benchmarks.local FOLDER
    lmms-eval --include_path FOLDER --tasks canvas_pope,canvas_vqa,canvas_ocr,canvas_boxes ...

The pictures are those of `eval.canvas`, of its test split: digits of scikit-learn on photos of scikit-learn and
scikit-image, whose credits are written beside them. Each task takes prompts and scores from one that lmms-eval ships.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import datasets
import typer
import yaml
from PIL import Image

from eval.canvas.data import NUMBERS, PHOTOS, Canvas, Canvases, Question

TASKS = Path(__file__).parent / "tasks"
DIGITS = "Handwritten digits: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0, by scikit-learn"
PEOPLE = 10  # who answered a question of VQAv2


def build(
    folder: Annotated[Path, typer.Argument(help="Where the tasks and their pictures go.")],
    canvases: Annotated[int, typer.Option(min=1, help="Pictures to ask about.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other pictures.")] = 0,
) -> list[str]:
    """Write the tasks into a folder, for `--include_path`, and return their names."""
    shipped = tasks_of_lmms_eval()
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {path.stem: [] for path in sorted(TASKS.glob("*.yaml"))}
    source = Canvases("test", seed)
    for index in range(canvases):
        canvas = source.canvas(index)
        picture = Image.fromarray(canvas.image)
        for question in source.questions(index):
            task, row = ROWS[question.kind](question)
            rows[task].append({"question_id": str(len(rows[task])), "image": picture, **row})
        for row in boxes(canvas):
            rows["canvas_boxes"].append({"question_id": str(len(rows["canvas_boxes"])), "image": picture, **row})
    for task, given in rows.items():
        datasets.Dataset.from_list(given).to_parquet(folder / f"{task}.parquet")
        config = yaml.safe_load((TASKS / f"{task}.yaml").read_text())
        config["include"] = str(shipped / config["include"])  # lmms-eval looks beside the file, or where a path says
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    photos = [f"{name} ({package}): {credit}" for name, (package, credit) in PHOTOS.items()]
    (folder / "credits.txt").write_text("\n".join([DIGITS, *photos, "Cropped, scaled, mirrored, reduced in contrast."]))
    return list(rows)


def tasks_of_lmms_eval() -> Path:
    """The folder of the tasks that lmms-eval ships."""
    found = find_spec("lmms_eval")
    if found is None or found.origin is None:
        raise ModuleNotFoundError('these tasks take their scores from lmms-eval; pip install "vltok[lmms]"')
    return Path(found.origin).parent / "tasks"


def _pope(question: Question) -> tuple[str, dict[str, Any]]:
    return "canvas_pope", {"question": question.text, "answer": question.answer}


def _vqa(question: Question) -> tuple[str, dict[str, Any]]:
    answers = [{"answer": question.answer, "answer_id": person} for person in range(PEOPLE)]
    return "canvas_vqa", {"question": question.text, "answer": question.answer, "answers": answers}


def _ocr(question: Question) -> tuple[str, dict[str, Any]]:
    return "canvas_ocr", {
        "question": question.text,
        "answers": [question.answer, str(NUMBERS.index(question.answer))],
    }


# The task that a kind of question belongs to, and its row there.
ROWS = {"exist": _pope, "where": _vqa, "count": _vqa, "quadrant": _ocr}


def boxes(canvas: Canvas) -> Iterator[dict[str, Any]]:
    """The digits that are on a canvas once, and where: left, top, width and height in pixels."""
    labels = canvas.labels.tolist()
    for label, (x0, y0, x1, y1) in zip(labels, canvas.boxes.tolist(), strict=True):
        if labels.count(label) == 1:
            yield {"answer": [f"the {NUMBERS[label]}"], "bbox": [x0, y0, x1 - x0, y1 - y0]}


if __name__ == "__main__":
    typer.run(build)
