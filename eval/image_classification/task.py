"""The task of all runs: pictures made ready for a model, and held in memory where they fit."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from eval.image_classification.augment import Augment
from eval.image_classification.data import Data
from eval.image_classification.models import ModelSpec
from eval.image_classification.pictures import Decoded, Pictures
from eval.image_classification.preprocess import Preprocess, Transform, for_model
from eval.image_classification.sources import Source


@dataclass(frozen=True)
class Task:
    """The pictures and what is done to them on their way into a model."""

    train: Pictures | None
    test: Pictures
    preprocess: Preprocess
    augment: Augment
    num_classes: int
    device: torch.device
    amp: bool = False

    def autocast(self) -> Any:
        """bfloat16 for matrix products, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()


def prepare(
    spec: ModelSpec,
    data: Data,
    augment: Augment,
    device: torch.device,
    *,
    amp: bool = False,
    side: int | None = None,
    crop_pct: float | None = None,
    drops: bool = False,
    workers: int = 0,
    memory: float = 4.0,
    advance: Callable[[str, int, int], Any] = lambda split, count, total: None,
) -> Task:
    """Make pictures ready for a model, decoding them now where they are to be held in memory.

    Args:
        spec: The model.
        data: The pictures.
        augment: Of training pictures.
        device: Where models compute, and where decoded pictures are held.
        amp: Whether matrix products are made in bfloat16.
        side: Height and width of the input; by default the model's own.
        crop_pct: See `for_model`.
        drops: Whether pictures that can't be decoded are left out and counted.
        workers: Processes that decode.
        memory: GiB up to which the decoded pictures of a split are held.
        advance: Told of decoding: "training" or "test", how many more are done, of how many.

    Raises:
        ValueError: If the pictures don't fit the model, or can't be decoded.
    """
    num_classes = spec.kwargs.get("num_classes", data.num_classes)
    if num_classes < data.num_classes:
        raise ValueError(f"the pictures have {data.num_classes} classes, more than the model's {num_classes}")
    preprocess = for_model(
        replace(spec, pretrained=False).create(0, num_classes),
        data.test,
        in_chans=spec.kwargs.get("in_chans"),
        side=side,
        crop_pct=crop_pct,
    )

    def ready(split: str, source: Source, transform: Transform, is_fixed: bool) -> Pictures:
        pictures = Pictures(Decoded(source, preprocess.mode, transform), drops=drops, workers=workers)
        channels, height, width = preprocess.input_size
        if is_fixed and len(source) * channels * height * width <= memory * 2**30:
            pictures.hold(device, lambda count: advance(split, count, len(source)))
        return pictures

    train = None
    if data.train is not None:
        train = ready("training", data.train, augment.transform(preprocess), augment.is_batched)
    test = ready("test", data.test, preprocess.test_transform(), True)
    return Task(train, test, preprocess, augment, num_classes, device, amp)
