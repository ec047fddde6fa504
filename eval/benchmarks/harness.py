"""lmms-eval as the other modules see it: tasks by name, one model, and what a row gives on a task.

The model is loaded once. A row is put on it and taken off again, so that a hundred rows don't load it a hundred times.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config, simple_parse_args_string

import vltok
from eval.benchmarks.plan import Row
from eval.benchmarks.results import COSTS, Cell
from eval.benchmarks.scores import choose_metric, sample_values
from vltok.integrations.lmms_eval import MODELS


@dataclass(frozen=True)
class Setup:
    """What a run hangs on besides rows and tasks.

    Attributes:
        model: Folder or id.
        backend: Which of vltok's models in lmms-eval runs it; they differ in defaults.
        model_args: Further arguments of that, as lmms-eval writes them: "min_pixels=3136,dtype=bfloat16".
        limit: Samples of a task, or None for all.
        batch_size: Prompts that are answered together.
        device: torch device, or None for the first GPU where there is one.
    """

    model: str
    backend: str = "vltok"
    model_args: str = ""
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None

    def settings(self, fingerprint: str) -> dict[str, Any]:
        """All of it that decides what comes out, and the versions of those that take part.

        Args:
            fingerprint: Tells the model from all others.
        """
        decisive = {name: value for name, value in asdict(self).items() if name != "device"}
        versions = {name: metadata.version(name) for name in ("lmms-eval", "transformers", "torch")}
        return {**decisive, "fingerprint": fingerprint, "versions": {"vltok": vltok.__version__, **versions}}


class Tasks:
    """Tasks of lmms-eval, and those of a folder.

    Attributes:
        columns: The names that were asked for, each with its single tasks: those of a group, or itself.
    """

    def __init__(self, names: Sequence[str], backend: str, include_path: Path | None) -> None:
        """Look the tasks up.

        Raises:
            ValueError: If lmms-eval knows no such task, or a group has tasks without names of their own.
        """
        folder = None if include_path is None else str(include_path)
        name = backend.removeprefix("vltok_")  # some tasks have prompts for models by their names in lmms-eval
        self.manager = TaskManager("ERROR", folder, include_defaults=False, model_name=name)
        if not set(names) <= set(self.manager.all_subtasks):  # reading the thousands that are shipped takes a while
            self.manager = TaskManager("ERROR", folder, model_name=name)
        self.columns = {each: self._leaves(each) for each in names}

    def _leaves(self, name: str) -> list[str]:
        known = self.manager.task_index
        if name not in known:
            raise ValueError(
                f"lmms-eval {metadata.version('lmms-eval')} knows no task {name!r}; its own are listed by lmms-eval "
                "--tasks list, others need --include-path"
            )
        if known[name]["type"] in ("task", "python_task"):
            return [name]
        members = known[name]["task"]
        if members == -1:  # a file of its own says
            members = load_yaml_config(known[name]["yaml_path"], mode="simple")["task"]
        if not all(isinstance(member, str) for member in members):
            raise ValueError(f"the group {name} makes tasks without names of their own; name single tasks instead")
        return [leaf for member in members for leaf in self._leaves(member)]

    def settings(self, task: str) -> dict[str, Any]:
        """What decides what a task asks: its name, and a digest of its configuration, code and local files."""
        place = Path(self.manager.task_index[task]["yaml_path"])
        config = load_yaml_config(str(place), mode="simple")
        digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
        data = _files((config.get("dataset_kwargs") or {}).get("data_files"))
        for path in [*sorted(place.parent.glob("*.py")), *data]:
            digest.update(path.read_bytes())
        return {"task": task, "task_digest": digest.hexdigest()}

    def figures(self, task: str) -> dict[str, dict[str, Any]]:
        """The figures of a task in its order, with what the task says of each."""
        config = load_yaml_config(self.manager.task_index[task]["yaml_path"], mode="full")
        return {figure["metric"]: figure for figure in config["metric_list"]}


class Bench:
    """A model that rows are put on."""

    def __init__(self, setup: Setup, tasks: Tasks, out: Path) -> None:
        """Load the model; whatever tasks write of their own goes to a folder in `out`."""
        self.setup, self.tasks, self.out = setup, tasks, out
        given = {"batch_size": setup.batch_size} | ({"device": setup.device} if setup.device else {})
        if setup.backend not in MODELS:
            raise ValueError(f"--backend must be one of {', '.join(MODELS)}, got {setup.backend!r}")
        cls = getattr(import_module("vltok.integrations.lmms_eval.model"), MODELS[setup.backend])
        self.lm = _lasting(cls)(pretrained=setup.model, **given, **simple_parse_args_string(setup.model_args))

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.lm.model.dtype).removeprefix("torch.")

    @contextmanager
    def put_on(self, row: Row) -> Iterator[None]:
        """Put a row on the model and its processor until the block ends."""
        if row.shrinks:
            handle = vltok.resize(self.lm.processor, row.keep_ratio)
        elif row.method is not None:
            handle = self.lm.handle = vltok.apply(self.lm.model, row.method, processor=self.lm.processor)
        else:
            handle = None
        try:
            yield
        finally:
            self.lm.handle = None
            if handle is not None:
                handle.remove()

    def refusal(self, row: Row) -> str | None:
        """Why the model can't have a row, or None if it can."""
        try:
            with self.put_on(row):
                return None
        except (vltok.errors.VltokError, ValueError) as error:
            return str(error)

    def run(self, task: str) -> Cell | None:
        """What the row that is on gives on a task; None in all processes but the first.

        Raises:
            RuntimeError: If a sample can't be answered. It names the task and the sample.
        """
        self.lm.usage.clear()
        results = simple_evaluate(
            self.lm,
            tasks=[task],
            task_manager=self.tasks.manager,
            limit=self.setup.limit,
            batch_size=self.setup.batch_size,
            bootstrap_iters=0,
            cli_args=Namespace(output_path=str(self.out / "submissions"), process_with_media=True),
        )
        usage = gather_object(self.lm.usage)
        if results is None:
            return None
        figures, samples = self.tasks.figures(task), results["samples"][task]
        numbers = results["results"][task]
        metric, answers = choose_metric(list(figures), numbers)
        return Cell(
            metric=metric,
            score=float(numbers[f"{metric},{answers}"]),
            higher_is_better=bool(figures[metric].get("higher_is_better", True)),
            samples=len({sample["doc_id"] for sample in samples}),
            values=sample_values(samples, metric, figures[metric]["aggregation"]),
            figures={name: value for name, value in numbers.items() if _is_figure(name, value, figures)},
            cost={name: float(np.mean([getattr(each, name) for each in usage])) for name in COSTS},
        )


def _lasting(cls: type) -> type:
    """The model's class, but for what lmms-eval calls after every task to let go of the model."""
    return type(cls.__name__, (cls,), {"clean": lambda self: None})


def _is_figure(name: str, value: Any, figures: Mapping[str, Any]) -> bool:
    """Whether a result is a finite number and one of the task's figures."""
    return name.partition(",")[0] in figures and isinstance(value, int | float) and bool(np.isfinite(value))


def _files(data_files: Any) -> list[Path]:
    """The local files of a task's data, if it has such."""
    if isinstance(data_files, Mapping):
        return [path for value in data_files.values() for path in _files(value)]
    if isinstance(data_files, list | tuple):
        return [path for value in data_files for path in _files(value)]
    return [path for path in [Path(str(data_files))] if path.is_file()]
