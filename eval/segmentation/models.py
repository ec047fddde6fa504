"""The models: Hugging Face semantic segmentation, from local folders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from eval.image_classification.records import environment
from eval.robustness.classifiers import digest, read_pretrained
from eval.robustness.setup import Setup
from eval.robustness.store import Store


@dataclass(frozen=True)
class Segmenter:
    """One model of the bench.

    Attributes:
        name: Its row in the table.
        folder: What `save_pretrained` wrote, or a name in the local cache.
        resizes: Whether pictures are brought to the size that the image processor says, or stay as they are.
    """

    name: str
    folder: str
    resizes: bool = True

    def build(self, setup: Setup) -> nn.Module:
        """Make the model with its image processor, in eval mode, on the setup's device."""
        kind = transformers.AutoModelForSemanticSegmentation
        model, report = read_pretrained(kind, self.folder, {"local_files_only": True, "output_loading_info": True})
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{self.folder} holds no trained segmentation model: {', '.join(missing[:3])} are missing")
        return Network(model, self.processor(), self.resizes).eval().to(setup.device)

    def processor(self) -> Any:
        """The image processor."""
        return read_pretrained(transformers.AutoImageProcessor, self.folder, {"local_files_only": True})

    def store(self, model: nn.Module, setup: Setup, folder: Path) -> Store:
        """Where its results are kept."""
        settings = {
            "digest": digest(model),
            "processor": model.processor.to_dict(),
            "resizes": self.resizes,
            "amp": setup.amp,
        }
        notes = {
            "model": self.name,
            "folder": self.folder,
            "classes": model.class_names,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "environment": environment(setup.device),
        }
        return Store(folder / f"{self.name}.json", settings, notes)


class Network(nn.Module):
    """A segmentation model that takes a picture as bytes and answers with a class per pixel."""

    def __init__(self, model: nn.Module, processor: Any, resizes: bool) -> None:
        super().__init__()
        self.model, self.processor, self.resizes = model, processor, resizes

    @property
    def class_names(self) -> list[str]:
        """What the outputs mean."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]

    def forward(self, pixels: np.ndarray, size: Sequence[int]) -> torch.Tensor:
        """Predict classes.

        Args:
            pixels: A picture, (H, W, 3) uint8.
            size: Height and width of the answer; scores are brought to it bilinearly before the best one is taken.

        Returns:
            Classes, (height, width), int64, on the model's device.
        """
        settings = {} if self.resizes else {"do_resize": False}
        device = next(self.model.parameters()).device
        inputs = self.processor(images=pixels, return_tensors="pt", **settings)["pixel_values"].to(device)
        scores = self.model(pixel_values=inputs).logits.float()  # (1, classes, h, w)
        return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=False).argmax(1)[0]


def plan_segmenters(texts: Sequence[str], resizes: bool) -> list[Segmenter]:
    """Read "NAME=FOLDER", or a folder alone that is named after itself.

    Raises:
        ValueError: If there is none, or a name comes twice.
    """
    planned = []
    for text in texts:
        name, equals, folder = text.rpartition("=")
        planned.append(Segmenter(name if equals else Path(folder).name, folder, resizes))
    names = [each.name.lower() for each in planned]
    if not planned or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"give one or more models, NAME=FOLDER, every name once; got {', '.join(texts) or 'none'}")
    return [replace(each, name=each.name.replace("/", "-")) for each in planned]
