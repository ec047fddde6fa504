"""The classifiers: timm models, or Hugging Face ones, with what is said in their files about preparing pictures."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import nn

import vltok
from eval.image_classification.models import ModelSpec, equip
from eval.image_classification.preprocess import Preprocess, Transform, for_model
from eval.image_classification.randomness import seed_all
from eval.image_classification.sources import Source


class TimmClassifiers:
    """Models of one timm architecture.

    Attributes:
        spec: Which.
        num_outputs: How many classes they tell apart.
        preprocess: How pictures are prepared.
        always_crops: Whether also pictures are cropped that are no larger than the input.
    """

    def __init__(self, spec: ModelSpec, num_classes: int, crop_pct: float | None = None) -> None:
        """Make one to see what it expects; `crop_pct` is the share of a picture's side, by default the model's own."""
        self.spec, self.always_crops = spec, crop_pct is not None
        self.num_outputs = spec.kwargs.get("num_classes", num_classes)
        model = ModelSpec(spec.name, spec.kwargs).create(0, self.num_outputs)
        in_chans = spec.kwargs.get("in_chans")
        self.preprocess = for_model(model, _Nothing(), in_chans=in_chans, crop_pct=crop_pct)

    def build(
        self, seed: int, methods: Sequence[vltok.Method], weights: Path | None, adapter: Path | None
    ) -> nn.Module:
        """Make a model with its weights and methods, in eval mode."""
        model, _ = self.spec.build(seed, self.num_outputs, methods, weights)
        return _finish(model, adapter)

    def settings(self) -> dict[str, Any]:
        """What the model is, as plain data."""
        return {"name": self.spec.name, "kwargs": dict(self.spec.kwargs), "outputs": self.num_outputs}


class HuggingFaceClassifiers:
    """Models of one folder that `save_pretrained` wrote, or of a name in the local cache.

    Attributes:
        name: The folder or name.
        num_outputs: How many classes they tell apart.
        preprocess: How pictures are prepared.
        class_names: What the outputs mean, None where the folder doesn't say so.
    """

    always_crops = False

    def __init__(self, name: str, downloads: bool = False, crop_pct: float | None = None) -> None:
        if crop_pct is not None:
            raise ValueError(
                "--crop-pct is for timm models; the image processor of others says how pictures are cropped"
            )
        self.name, self._local = name, {"local_files_only": not downloads}
        config = read_pretrained(transformers.AutoConfig, name, self._local)
        self.preprocess = HuggingFacePreprocess(read_pretrained(transformers.AutoImageProcessor, name, self._local))
        self.num_outputs = config.num_labels
        names = [config.id2label[index] for index in range(config.num_labels)]
        is_named = names != [f"LABEL_{index}" for index in range(config.num_labels)]
        self.class_names = names if is_named and len(set(names)) == len(names) else None

    def build(
        self, seed: int, methods: Sequence[vltok.Method], weights: Path | None, adapter: Path | None
    ) -> nn.Module:
        """Make a model with its weights and methods, in eval mode."""
        seed_all(seed)
        model, report = read_pretrained(
            transformers.AutoModelForImageClassification, self.name, self._local | {"output_loading_info": True}
        )
        if weights is None and (report["missing_keys"] or report["mismatched_keys"]):
            missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
            raise ValueError(
                f"{self.name} holds no trained classifier: {', '.join(missing[:3])} would be random; give a folder of "
                "a model that was trained to classify pictures, or --weights"
            )
        equip(model, seed, methods, weights)
        return _finish(model, adapter)

    def settings(self) -> dict[str, Any]:
        """What the model is, as plain data; its weights are in the digest."""
        return {"name": self.name, "outputs": self.num_outputs}


Classifiers = TimmClassifiers | HuggingFaceClassifiers


@dataclass(frozen=True)
class HuggingFacePreprocess:
    """An image processor taken apart: first the picture's size, as bytes; scaling comes after the corruption."""

    mode: ClassVar[str] = "RGB"

    processor: Any

    def __post_init__(self) -> None:
        if self.input_size is None:
            raise ValueError(f"{type(self.processor).__name__} doesn't say one size for all pictures: {self.processor}")

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height, width; None where the width would depend on the picture."""
        does_crop = getattr(self.processor, "do_center_crop", False) and self.processor.crop_size
        size = self.processor.crop_size if does_crop else self.processor.size
        return (3, size["height"], size["width"]) if size["height"] and size["width"] else None

    def test_transform(self) -> Transform:
        """The processor's own, to uint8 (C, H, W)."""
        return self._resize

    def whole_transform(self) -> Transform:
        """The same without cutting off a border."""
        _, height, width = self.input_size
        settings = {"size": {"height": height, "width": width}, "do_center_crop": False}
        return partial(self._resize, **settings)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 pictures (B, C, H, W) to what the model expects, float32."""
        processor = self.processor
        images = images.float() * (processor.rescale_factor if processor.do_rescale else 1.0)
        if not processor.do_normalize:
            return images
        mean, std = (
            torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (processor.image_mean, processor.image_std)
        )
        return (images - mean) / std

    def settings(self) -> dict[str, Any]:
        """All the processor's settings, as plain data."""
        return self.processor.to_dict()

    def _resize(self, image: Image.Image, **settings: Any) -> torch.Tensor:
        only_size = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        return self.processor(images=image, **only_size, **settings)["pixel_values"][0]


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Scores of the classes, (B, outputs), for prepared pictures, of a timm or a Hugging Face model."""
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def digest(model: nn.Module) -> str:
    """Changes with the names and values of a model's weights, wherever they come from."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def preprocess_settings(preprocess: Preprocess | HuggingFacePreprocess) -> dict[str, Any]:
    """How pictures are prepared, as plain data."""
    return preprocess.settings() if isinstance(preprocess, HuggingFacePreprocess) else vars(preprocess)


class _Nothing(Source):
    """No pictures: nothing is known of their sizes, so that a model's own crop is kept."""

    def __init__(self) -> None:
        self.labels = []

    def fits(self, height: int, width: int) -> bool:
        return False


def _finish(model: nn.Module, adapter: Path | None) -> nn.Module:
    if adapter is not None:
        vltok.load(model, adapter)
    return model.eval()


def read_pretrained(kind: Any, name: str, settings: dict[str, Any]) -> Any:
    """Read something of transformers from a folder, or a name in its cache; `kind` is one of its Auto classes.

    Raises:
        ValueError: If that fails.
    """
    transformers.utils.logging.disable_progress_bar()  # there is a bar of our own
    try:
        return kind.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} can't be read by transformers' {kind.__name__}: {error}. It should be a folder that "
            "save_pretrained wrote, with its preprocessor_config.json"
        ) from error
