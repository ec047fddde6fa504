"""Augmentation: cheap crops and flips of whole batches, or timm's transforms picture by picture."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from eval.image_classification.pictures import Batch, Pictures
from eval.image_classification.preprocess import Preprocess, Transform
from eval.image_classification.randomness import generator
from eval.image_classification.settings import parse_named

_CROP_FLIP = {"pad": (int, type(None)), "hflip": (int, float)}


@dataclass(frozen=True)
class Augment:
    """What is done to training pictures.

    Attributes:
        kind: "crop-flip": shift by up to `pad` pixels (an eighth of the side by default), black where nothing is left,
            and mirror with probability `hflip` (0.5), on whole batches of uint8; "timm": the random transform of
            timm.data.create_transform with these settings, picture by picture; "none".
        settings: Of that kind.
    """

    kind: str = "crop-flip"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("crop-flip", "timm", "none"):
            raise ValueError(f"augmentation is crop-flip, timm or none, got {self.kind!r}")
        if self.kind == "none" and self.settings:
            raise ValueError(f"augmentation none has no settings, got {dict(self.settings)}")
        if self.kind == "crop-flip":
            if unknown := self.settings.keys() - _CROP_FLIP:
                raise ValueError(f"crop-flip has the settings {', '.join(_CROP_FLIP)}, not {', '.join(unknown)}")
            for name, value in self.settings.items():
                if not isinstance(value, _CROP_FLIP[name]) or (value is not None and value < 0):
                    raise ValueError(f"crop-flip's {name} must be a number from 0, got {value!r}")

    @property
    def is_batched(self) -> bool:
        """Whether it works on batches of decoded pictures, so that decoding once is enough."""
        return self.kind != "timm"

    def transform(self, preprocess: Preprocess) -> Transform:
        """What every picture goes through when it is decoded."""
        return preprocess.whole_transform() if self.is_batched else preprocess.train_transform(self.settings)

    def __call__(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Augment a batch (B, C, H, W) of uint8."""
        if self.kind != "crop-flip":
            return images
        pad = self.settings.get("pad")
        return crop_flip(images, images.shape[-1] // 8 if pad is None else pad, self.settings.get("hflip", 0.5), random)


def parse_augment(text: str) -> Augment:
    """Read "crop-flip,pad=4,hflip=0", "timm,scale=(0.6,1.0),auto_augment=rand-m9" or "none"."""
    return Augment(*parse_named(text))


def crop_flip(images: torch.Tensor, pad: int, hflip: float, random: torch.Generator) -> torch.Tensor:
    """Shift every picture of a batch by its own -pad..pad pixels both ways, and mirror some.

    Args:
        images: (B, C, H, W), any dtype.
        pad: Largest shift in pixels; what moves in is 0.
        hflip: Probability of mirroring left and right, 0..1.
        random: Generator on the CPU.
    """
    count, _, height, width = images.shape
    rows, columns = torch.randint(0, 2 * pad + 1, (2, count), generator=random).to(images.device)
    mirrored = (torch.rand(count, generator=random) < hflip).to(images.device)
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W)
    cut = windows[torch.arange(count, device=images.device), :, rows, columns]
    return torch.where(mirrored[:, None, None, None], cut.flip(3), cut)


def training_batches(pictures: Pictures, augment: Augment, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield augmented batches without end; the seed alone decides their order and what is done to them.

    Raises:
        ValueError: If there are not enough pictures for one batch.
    """
    if len(pictures) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many training pictures; there are {len(pictures)}")
    epoch = 0
    while True:
        random = generator(seed, epoch)
        order = torch.randperm(len(pictures), generator=random)
        order = order[: len(order) // batch_size * batch_size]
        transform_seed = int(torch.randint(2**31, (), generator=random))
        for images, labels in pictures.batches(order, batch_size, transform_seed):
            yield augment(images, random), labels
        epoch += 1
