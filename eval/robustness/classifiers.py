"""The classifiers: timm models, or Hugging Face ones, how their pictures are prepared, and what their outputs mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from timm.data import ImageNetInfo
from timm.utils import random_seed
from torch import nn

import vltok
from eval.image_classification.data import Pictures
from eval.image_classification.models import ModelSpec, equip
from eval.image_classification.preprocess import for_model


class TimmClassifiers:
    """Models of one timm architecture.

    Attributes:
        names: What the outputs mean, None where nobody says so.
        num_outputs: How many there are.
        preprocess: How pictures are prepared.
        always_crops: Whether also pictures are cropped that are no larger than the input.
        has_weights: Whether the model brings trained weights by itself.
        settings: What the architecture and its preprocessing are, as plain data.
    """

    def __init__(self, spec: ModelSpec, num_outputs: int, names: list[str] | None, crop_pct: float | None) -> None:
        self.spec, self.always_crops, self.has_weights = spec, crop_pct is not None, spec.pretrained
        self.num_outputs, self.names = spec.kwargs.get("num_classes", num_outputs), names
        model = ModelSpec(spec.name, spec.kwargs).create(0, self.num_outputs)
        self.preprocess = for_model(model, spec.kwargs.get("in_chans"), crop_pct)
        self.settings = {"name": spec.name, "kwargs": dict(spec.kwargs), "preprocess": self.preprocess.config}

    def build(self, seed: int, methods: Sequence[vltok.Method], weights: Path | None) -> nn.Module:
        return self.spec.build(seed, self.num_outputs, methods, weights)[0]


class HuggingFaceClassifiers:
    """Models of one folder that `save_pretrained` wrote, or of a name in the local cache; see
    `TimmClassifiers`."""

    always_crops, has_weights = False, True

    def __init__(self, name: str, downloads: bool, names: list[str] | None) -> None:
        self.name, self._local = name, {"local_files_only": not downloads}
        config = read_pretrained(transformers.AutoConfig, name, self._local)
        self.preprocess = ProcessorSteps(read_pretrained(transformers.AutoImageProcessor, name, self._local))
        self.num_outputs = config.num_labels
        own = [config.id2label[index] for index in range(config.num_labels)]
        # ImageNet's are words there, in folders they are wnids
        is_named = own[0] != "LABEL_0" and len(set(own)) == len(own) != 1000
        self.names = names or (own if is_named else None)
        self.settings = {"name": name, "preprocess": self.preprocess.processor.to_dict()}

    def build(self, seed: int, methods: Sequence[vltok.Method], weights: Path | None) -> nn.Module:
        random_seed(seed)
        kind = transformers.AutoModelForImageClassification
        model, found = read_pretrained(kind, self.name, self._local | {"output_loading_info": True})
        if weights is None and (missing := [*found["missing_keys"], *map(str, found["mismatched_keys"])]):
            raise ValueError(
                f"{self.name} holds no trained classifier: {', '.join(sorted(missing)[:3])} would be random; give a "
                "folder of a model that was trained to classify pictures, or --weights"
            )
        equip(model, seed, methods, weights)
        return model


Classifiers = TimmClassifiers | HuggingFaceClassifiers


@dataclass(frozen=True)
class ProcessorSteps:
    """An image processor taken apart: first the picture's size, as bytes; scaling comes after the corruption."""

    processor: Any
    mode = "RGB"

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        does_crop = getattr(self.processor, "do_center_crop", False) and self.processor.crop_size
        size = self.processor.crop_size if does_crop else self.processor.size
        if not size["height"] or not size["width"]:
            raise ValueError(f"{type(self.processor).__name__} doesn't say one size for all pictures: {self.processor}")
        return 3, size["height"], size["width"]

    def transform(self, crops: bool) -> Callable[[Image.Image], torch.Tensor]:
        """The processor's own, to uint8 (C, H, W); without `crops` nothing that fits is cut off."""
        size = dict(zip(("height", "width"), self.input_size[1:], strict=True))
        return partial(self._resize, **({} if crops else {"size": size, "do_center_crop": False}))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 pictures (B, C, H, W) to what the model expects, float32."""
        images = images.float() * (self.processor.rescale_factor if self.processor.do_rescale else 1.0)
        if not self.processor.do_normalize:
            return images
        pair = (self.processor.image_mean, self.processor.image_std)
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in pair)
        return (images - mean) / std

    def _resize(self, image: Image.Image, **settings: Any) -> torch.Tensor:
        only_size = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        return self.processor(images=image, **only_size, **settings)["pixel_values"][0]


def open_classifiers(
    model: str,
    kwargs: Mapping[str, Any],
    clean: Pictures | None,
    *,
    pretrained: bool = False,
    crop_pct: float | None = None,
    classes: Path | None = None,
) -> Classifiers:
    """The architecture of `--model`; `classes` says what its outputs mean, else the clean pictures if they fit.

    Raises:
        ValueError: If the options don't fit it.
    """
    given = read_classes(classes) if classes is not None else None
    if Path(model).is_dir() or ("/" in model and ":" not in model):  # timm's hub names have a colon
        if kwargs or crop_pct:
            raise ValueError(f"--model-kwargs and --crop-pct are for timm models; {model} is one of Hugging Face")
        found: Classifiers = HuggingFaceClassifiers(model, pretrained, given)
    else:
        of_data = 1000 if clean is None else len(clean.classes or range(clean.labels.max() + 1))
        count = 1000 if pretrained else len(given) if given else of_data
        found = TimmClassifiers(ModelSpec(model, kwargs, pretrained), count, given, crop_pct)
    if given is not None and len(given) != found.num_outputs:
        raise ValueError(f"--classes names {len(given)} classes, the model has {found.num_outputs} outputs")
    if found.names is None and clean is not None and len(clean.classes or ()) == found.num_outputs:
        found.names = list(clean.classes)
    if found.names is None and found.num_outputs == 1000:
        found.names = ImageNetInfo("imagenet-1k").label_names()
    return found


def read_classes(path: Path) -> list[str]:
    """Read the names of a model's classes in the order of its outputs.

    Args:
        path: A text file with one name in each line (what follows a space is ignored), or a folder whose subfolders,
            sorted, are the classes, such as ImageNet's val/.

    Raises:
        ValueError: If there are no classes in it, or a name comes twice.
    """
    lines = (
        sorted(each.name for each in path.iterdir() if each.is_dir()) if path.is_dir() else path.read_text().split("\n")
    )
    names = [line.split()[0] for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} must name every class once, in a line or by a subfolder of its own; got {names[:5]}")
    return names


def match_outputs(pictures: Pictures, classifiers: Classifiers, where: str) -> Pictures:
    """Turn the labels of pictures into numbers of outputs, by the names of their classes.

    Pictures without names of classes, such as those of an npz file without `classes`, are labelled by output already.

    Raises:
        ValueError: If a class is no output of the model.
    """
    names, count = classifiers.names, classifiers.num_outputs
    if pictures.classes is None or (names is None and len(pictures.classes) == count):
        if pictures.labels.max() >= count:
            raise ValueError(f"{where} has labels up to {pictures.labels.max()}, the model {count} outputs")
        return pictures
    if names is None:
        raise ValueError(
            f"{where} has {len(pictures.classes)} classes, the model {count} outputs, and nothing says which is which: "
            "name the classes of the outputs with --classes, a file or the folder of all classes"
        )
    if unknown := [name for name in pictures.classes if name not in names]:
        raise ValueError(
            f"{where} has {len(unknown)} classes that are none of the model's {len(names)}: {', '.join(unknown[:3])}; "
            f"those are named {', '.join(names[:3])}, ...; --classes says otherwise"
        )
    matched = copy.copy(pictures)
    number = {name: index for index, name in enumerate(names)}
    matched.labels = np.array([number[name] for name in pictures.classes], np.int64)[pictures.labels]
    return matched


def read_pretrained(kind: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """Read something of transformers from a folder, or a name in its cache; `kind` is one of its Auto classes.

    Raises:
        ValueError: If that fails.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} can't be read by transformers' {kind.__name__}: {error}. It should be a folder that "
            "save_pretrained wrote, with its preprocessor_config.json"
        ) from error
