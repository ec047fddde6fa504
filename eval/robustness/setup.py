"""What all measurements of a bench share."""

from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from eval.image_classification.pictures import UnreadablePictureError
from eval.robustness.classifiers import Classifiers


class FaultName(StrEnum):
    """What to do about a picture that can't be decoded."""

    stop = "stop"
    skip = "skip"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of a bench.

    Attributes:
        device: Where models compute.
        amp: Whether matrix products are made in bfloat16.
        batch_size: Pictures that go through a model together.
        workers: Processes that decode and corrupt; 0 does so in this one.
        limit: How many pictures are taken of each source, spread evenly over it; None for all.
        skips: Whether pictures that can't be decoded are counted and left out, instead of an error.
        seed: Of the corruptions.
    """

    device: torch.device
    amp: bool = False
    batch_size: int = 64
    workers: int = 0
    limit: int | None = None
    skips: bool = False
    seed: int = 0

    def autocast(self) -> Any:
        """bfloat16 for matrix products, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def choose(self, count: int) -> np.ndarray:
        """Which of `count` things are looked at: ascending numbers, int64."""
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        return np.arange(self.limit) * count // self.limit

    def report(self, faults: list[str]) -> None:
        """Raise an `UnreadablePictureError` for the first fault, unless such pictures are to be skipped."""
        if faults and not self.skips:
            raise UnreadablePictureError(f"{faults[0]}; --on-bad-image skip leaves such pictures out and counts them")


@dataclass(frozen=True, kw_only=True)
class ClassifierSetup(Setup):
    """Settings of a bench of classifiers.

    Attributes:
        classifiers: The architecture, and how its pictures are prepared.
        names: What its outputs mean, None where nobody said so.
        corrupts_input: Whether pictures are corrupted at the size of the model's input, as ImageNet-C was made, or
            before they are resized.
    """

    classifiers: Classifiers
    names: list[str] | None = None
    corrupts_input: bool = True
