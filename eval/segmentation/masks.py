"""Overlap of predicted and true masks on clean and corrupted pictures, for Hugging Face models of local folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassJaccardIndex

from eval.image_classification.data import UNREADABLE, UnreadablePictureError
from eval.image_classification.models import digest
from eval.robustness.bench import Model, Setup
from eval.robustness.classifiers import read_pretrained
from eval.robustness.corruptions import corrupt, describe, picture_seed
from eval.segmentation.layouts import IGNORED, Pair, Pairs


class Network(nn.Module):
    """A segmentation model that takes a picture as bytes and answers with a class per pixel.

    Args:
        folder: What `save_pretrained` wrote, or a name in the local cache.
        resizes: Whether pictures are brought to the size that the image processor says, or stay as they are.
        device: Where it computes.

    Raises:
        ValueError: If the folder holds no trained segmentation model with its image processor.
    """

    def __init__(self, folder: str, resizes: bool, device: str) -> None:
        super().__init__()
        local = {"local_files_only": True}
        kind = transformers.AutoModelForSemanticSegmentation
        self.model, found = read_pretrained(kind, folder, local | {"output_loading_info": True})
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{folder} holds no trained segmentation model: {', '.join(missing[:3])} are missing")
        self.processor, self.resizes = read_pretrained(transformers.AutoImageProcessor, folder, local), resizes
        self.class_names = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
        self.eval().to(device)

    def described(self, amp: bool) -> Model:
        """The network with all that decides what it answers."""
        about = {"digest": digest(self.model.state_dict()), "processor": self.processor.to_dict()}
        return Model(self, about | {"resizes": self.resizes, "amp": amp})

    def forward(self, pixels: np.ndarray, size: Sequence[int]) -> torch.Tensor:
        """Predict classes.

        Args:
            pixels: A picture, (H, W, 3) uint8.
            size: Height and width of the answer; scores are brought to it bilinearly before the best one is taken.

        Returns:
            Classes, (height, width), int64, on the model's device.
        """
        settings = {} if self.resizes else {"do_resize": False}
        inputs = self.processor(images=pixels, return_tensors="pt", **settings)["pixel_values"].to(self.model.device)
        scores = self.model(pixel_values=inputs).logits.float()  # (1, classes, h, w)
        return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=False).argmax(1)[0]


@dataclass
class Masks(Dataset):
    """A cell of pictures with masks, corrupted at their full size; an item is pixels, mask and pair.

    Attributes:
        name: Of the cell.
        root: Of the pictures.
        found: The pictures.
        setup: Of the bench.
        how: The corruption, None for none, and its severity.
        reduces: Whether 0 in a mask is no class, and the others count from 1.
    """

    name: str
    root: Path
    found: Pairs
    setup: Setup
    how: tuple[str | None, int] = (None, 0)
    reduces: bool = False

    def open(self) -> dict[str, Any]:
        self._chosen = self.setup.choose(len(self.found.pairs))
        made = describe(*self.how, self.setup.seed, "picture") if self.how[0] else None
        about = {"pictures": self.found.fingerprint(self.root), "layout": self.found.layout, "corruption": made}
        return about | {"chosen": len(self._chosen), "reduces": self.reduces}

    def batches(self) -> Iterable[tuple[np.ndarray, np.ndarray, Pair]]:
        return self.setup.load(self, self._chosen)

    def tally(self, module: Network) -> Overlap:
        return Overlap(len(module.class_names), self.setup)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, Pair]:
        pair = self.found.pairs[index]
        try:
            with Image.open(pair.image) as opened:
                pixels = np.array(opened.convert("RGB"))
            mask = pair.read_mask()
        except UNREADABLE as error:
            raise UnreadablePictureError(f"{pair.image} and {pair.mask} can't be decoded: {error}") from error
        if mask.shape != pixels.shape[:2]:
            size = f"{mask.shape[1]} x {mask.shape[0]}"
            raise ValueError(f"{pair.mask} has {size} pixels, its picture {pixels.shape[1::-1]}")
        if self.reduces:  # 0 becomes 255, what is left counts from 0
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1).astype(np.uint8)
        if self.how[0] is not None:
            pixels = corrupt(pixels, *self.how, picture_seed(self.setup.seed, index, *self.how))
        return pixels, mask, pair


class Overlap:
    """IoU of each class over the pixels of all pictures, and of each group of pictures by itself."""

    def __init__(self, num_classes: int, setup: Setup) -> None:
        self.num_classes, self.setup, self.tested = num_classes, setup, 0
        self.by_group: dict[str, MulticlassJaccardIndex] = {}

    def update(self, module: Network, batch: tuple[np.ndarray, np.ndarray, Pair]) -> None:
        pixels, mask, pair = batch
        if np.any((mask >= self.num_classes) & (mask != IGNORED)):
            top = mask[mask != IGNORED].max()
            raise ValueError(
                f"{pair.mask}: a mask has the value {top}, the model {self.num_classes} classes; values are 0 to "
                f"{self.num_classes - 1}, and {IGNORED} for pixels to leave out"
            )
        with self.setup.autocast():
            predicted = module(pixels, mask.shape)
        true = torch.from_numpy(mask).long().to(predicted.device)
        for group in {"", pair.group}:
            if group not in self.by_group:
                # a class that is nowhere, neither true nor predicted, has no IoU
                index = MulticlassJaccardIndex(
                    self.num_classes, "none", IGNORED, validate_args=False, zero_division=torch.nan
                )
                self.by_group[group] = index.to(predicted.device)
            self.by_group[group].update(predicted[None], true[None])
        self.tested += 1

    def compute(self) -> dict[str, Any]:
        ious = {group: index.compute().double() for group, index in sorted(self.by_group.items())}
        if ious[""].isnan().all():
            raise ValueError(f"every pixel of every mask is {IGNORED}, which is left out")
        means = {group: each.nanmean().item() for group, each in ious.items() if not each.isnan().all()}
        known = [None if value != value else value for value in ious.pop("").tolist()]
        return {"miou": means.pop(""), "iou": known, "groups": means, "tested": self.tested}
