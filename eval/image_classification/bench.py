"""Runs of all arms and seeds: what each depends on, and carrying out those that are not on disk yet."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.image_classification.arms import Arm, start_arm, training_order
from eval.image_classification.distill import Distillation, Teacher
from eval.image_classification.models import ModelSpec, weights_checksum
from eval.image_classification.recipe import Recipe
from eval.image_classification.records import Records, environment
from eval.image_classification.training import Task, evaluate, fit

Advance = Callable[[str], Any]


@dataclass(frozen=True)
class Bench:
    """A comparison.

    Attributes:
        arms: What is compared.
        task: The pictures.
        spec: The model.
        weights: File of the first weights of arms that start from nothing else; "{seed}" and "{arm}" are filled in.
        recipe: Of arms that start from these weights, or from random ones.
        tuning: Of arms that start from a trained model.
        distillation: What the latter learn from the model they start from.
        eval_every: Steps between evaluations, None for an epoch.
        pictures: What the pictures were and what is done to them, for the records.
        records: Where the runs go.
    """

    arms: list[Arm]
    task: Task
    spec: ModelSpec
    weights: str | None
    recipe: Recipe
    tuning: Recipe
    distillation: Distillation
    eval_every: int | None
    pictures: Mapping[str, Any]
    records: Records

    def settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that the result of a run depends on, as plain data."""
        start = start_arm(arm, self.arms)
        is_started = arm.start is not None
        settings = {
            "arm": arm.to_dict(),
            "model": asdict(self.spec),
            "pictures": dict(self.pictures),
            "recipe": asdict(self.tuning if is_started else self.recipe),
            "eval_every": self.eval_every,
        }
        if is_started:
            settings["distillation"] = asdict(self.distillation)
        if start is not None:
            settings["start"] = self.settings(start, seed)
        elif (path := self._first_weights(arm, seed)) is not None:
            settings["weights"] = weights_checksum(path)
        return settings

    def finished(self, seeds: list[int]) -> dict[tuple[str, int], dict[str, Any]]:
        """Records of the runs that are on disk.

        Raises:
            ValueError: If one has other settings.
        """
        found = {}
        for arm in self.arms:
            for seed in seeds:
                record = self.records.read(arm, seed, self.settings(arm, seed))
                if record is not None:
                    found[arm.name, seed] = record
        return found

    def missing(self, seeds: list[int]) -> list[tuple[Arm, int]]:
        """Runs to make, seed by seed, every arm after the one it starts from."""
        done = self.finished(seeds)
        return [(arm, seed) for seed in seeds for arm in training_order(self.arms) if (arm.name, seed) not in done]

    def train(self, arm: Arm, seed: int, advance: Advance) -> dict[str, Any]:
        """Make one run and write it; returns its record."""
        path = self._first_weights(arm, seed)
        # Weights of a start are of a model without methods, whatever the classes of the data were then.
        spec = self.spec if arm.start is None else replace(self.spec, pretrained=False, new_head=False)
        model, handle = spec.build(seed, self.task.num_classes, arm.methods, path)
        model.to(self.task.device)
        teacher = None
        if arm.start is not None and self.distillation.is_on:
            plain, _ = spec.build(seed, self.task.num_classes, (), path)
            teacher = Teacher(plain.to(self.task.device), self.distillation)
        is_started = arm.start is not None
        result = fit(
            model,
            handle,
            self.task,
            self.tuning if is_started else self.recipe,
            seed,
            teacher=teacher,
            eval_every=self.eval_every,
            eval_first=is_started,
            advance=advance,
        )
        record = {**self._record(arm, seed, model), **result}
        self.records.write(arm, seed, record, model)
        return record

    def evaluate(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Test the model of an arm as it starts; returns a record without a curve."""
        model, _ = self.spec.build(seed, self.task.num_classes, arm.methods, self._first_weights(arm, seed))
        model.to(self.task.device)
        return {**self._record(arm, seed, model), **evaluate(model, self.task)}

    def steps(self, arm: Arm) -> int:
        """Steps of a run of an arm."""
        recipe = self.recipe if arm.start is None else self.tuning
        return recipe.total_steps(len(self.task.train))

    def _record(self, arm: Arm, seed: int, model: Any) -> dict[str, Any]:
        splits = {"train": self.task.train, "test": self.task.test}
        return {
            "settings": self.settings(arm, seed),
            "seed": seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dropped": {name: len(split.dropped) for name, split in splits.items() if split is not None},
            "environment": environment(self.task.device),
        }

    def _first_weights(self, arm: Arm, seed: int) -> Path | None:
        """The file a run starts from: of another arm, or named by the options; None for random or published weights."""
        start = start_arm(arm, self.arms)
        if start is not None:
            return self.records.weights(start, seed)
        pattern = arm.start or self.weights
        return None if pattern is None else Path(pattern.replace("{seed}", str(seed)).replace("{arm}", arm.name))
