"""Contenders: every arm with the trained weights of every seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from eval.image_classification.arms import Arm, parse_arm, parse_methods
from eval.image_classification.records import environment
from eval.robustness.classifiers import digest, preprocess_settings
from eval.robustness.setup import ClassifierSetup
from eval.robustness.store import Store

WEIGHTS = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Contender:
    """One model of the bench.

    Attributes:
        arm: Its row in the table.
        seed: Which of the arm's trained models.
        weights: A file of weights, of the plain model or with those of the methods; None for published ones.
        adapter: A folder that `vltok.save` wrote, None without one.
    """

    arm: Arm
    seed: int
    weights: Path | None
    adapter: Path | None

    @property
    def name(self) -> str:
        """Name of the arm."""
        return self.arm.name

    def build(self, setup: ClassifierSetup) -> nn.Module:
        """Make the model, in eval mode, on the setup's device."""
        model = setup.classifiers.build(self.seed, self.arm.methods, self.weights, self.adapter)
        return model.to(setup.device)

    def store(self, model: nn.Module, setup: ClassifierSetup, folder: Path) -> Store:
        """Where its results are kept."""
        classifiers = setup.classifiers
        settings = {
            "model": classifiers.settings(),
            "methods": [method.to_dict() for method in self.arm.methods],
            "digest": digest(model),
            "preprocess": preprocess_settings(classifiers.preprocess),
            "amp": setup.amp,
        }
        notes = {
            "arm": self.arm.to_dict(),
            "seed": self.seed,
            "weights": str(self.weights or self.adapter or ""),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "environment": environment(next(model.parameters()).device),
        }
        return Store(folder / f"{self.arm.name}-seed{self.seed}.json", settings, notes)


def plan_contenders(
    arms: Sequence[str], methods: Sequence[str], weights: str | None, seeds: Sequence[int], has_own_weights: bool
) -> list[Contender]:
    """Make the contenders from the options, arm by arm.

    Args:
        arms: "NAME=METHODS" or "NAME@START=METHODS"; START is a file of weights or a folder of `vltok.save`.
        methods: Methods of the only arm, where no arms are given.
        weights: File of weights of the arms that name none; {arm} and {seed} are filled in, also in START.
        seeds: Of each arm.
        has_own_weights: Whether the model brings weights by itself.

    Raises:
        ValueError: If the options contradict each other or leave a model without weights.
        FileNotFoundError: If weights are not there.
    """
    if arms and methods:
        raise ValueError("give methods as part of the arms, or --method without --arm")
    planned = [parse_arm(text) for text in arms]
    if not planned:
        parsed = parse_methods("+".join(methods))
        planned = [Arm("+".join(method.name for method in parsed) or "plain", parsed)]
    if len({arm.name.lower() for arm in planned}) < len(planned):  # files of arms that differ in case would meet
        raise ValueError(f"every arm needs a name of its own, got {', '.join(arm.name for arm in planned)}")
    return [_contender(arm, seed, weights, seeds, has_own_weights) for arm in planned for seed in seeds]


def _contender(arm: Arm, seed: int, weights: str | None, seeds: Sequence[int], has_own_weights: bool) -> Contender:
    patterns = [pattern for pattern in (arm.start, weights) if pattern is not None]
    if len(seeds) > 1 and not any("{seed}" in pattern for pattern in patterns):
        raise ValueError(
            f"the seeds of arm {arm.name!r} would be the same model: put {{seed}} into the names of weights"
        )
    is_adapter = arm.start is not None and Path(arm.start).suffix not in WEIGHTS
    adapter = _fill(arm.start, arm, seed) if is_adapter else None
    if adapter is not None and arm.methods:
        raise ValueError(f"arm {arm.name!r} starts from the folder {adapter}, which says itself what its methods are")
    if adapter is not None and not (adapter / "vltok_config.json").is_file():
        raise FileNotFoundError(f"{adapter} is neither a file of weights ({', '.join(WEIGHTS)}) nor from vltok.save()")
    file = _fill(weights if is_adapter or arm.start is None else arm.start, arm, seed)
    if file is None and not has_own_weights:
        raise ValueError(
            f"arm {arm.name!r} has no trained weights: give --weights FILE, NAME@FILE=METHODS or --pretrained"
        )
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"there is no file of weights {file}, of arm {arm.name!r}")
    return Contender(arm, seed, file, adapter)


def _fill(pattern: str | None, arm: Arm, seed: int) -> Path | None:
    return None if pattern is None else Path(pattern.replace("{seed}", str(seed)).replace("{arm}", arm.name))
