"""Pictures made ready for a timm model: its own resizing and scaling, and augmentation of whole batches or timm's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader, create_transform, resolve_model_data_config
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from eval.image_classification.arms import parse_fields
from eval.image_classification.data import Pictures

Batch = tuple[torch.Tensor, torch.Tensor]  # pictures (B, C, H, W) as the model takes them, labels (B,)


@dataclass(frozen=True)
class Preprocess:
    """What a model expects of its pictures.

    Attributes:
        config: timm's words for it: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
    """

    config: Mapping[str, Any]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels (1 or 3), height, width."""
        return tuple(self.config["input_size"])

    @property
    def mode(self) -> str:
        """What a picture is converted to first, as Pillow names it."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def transform(self, crops: bool) -> Callable[[Image.Image], torch.Tensor]:
        """timm's transform for evaluation, to uint8 (C, H, W); without `crops` nothing that fits is cut off."""
        return create_transform(**self.words(crops), normalize=False)

    def words(self, crops: bool) -> dict[str, Any]:
        """timm's words for a test picture."""
        return {**self.config, **({} if crops else {"crop_pct": 1.0, "crop_mode": "center"})}

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 pictures (B, C, H, W) to what the model expects, float32."""
        mean, std = (torch.tensor(self.config[x], device=images.device).view(1, -1, 1, 1) for x in ("mean", "std"))
        return (images.float() - 255 * mean).div_(255 * std)


def for_model(model: nn.Module, in_chans: int | None = None, crop_pct: float | None = None) -> Preprocess:
    """Read from a timm model how its pictures are prepared.

    Args:
        model: The model.
        in_chans: Channels it was made for, if it was told so.
        crop_pct: In the place of the model's own.

    Raises:
        ValueError: If the model takes neither 1 nor 3 channels.
    """
    config = resolve_model_data_config(model)
    channels = in_chans or config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, the model takes {channels}")
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)  # what img_size=... changed, if it did
    mean, std = ((sum(x) / len(x),) if channels < len(x) else tuple(x) for x in (config["mean"], config["std"]))
    size = (channels, *(own or config["input_size"][1:]))
    names = {"input_size": size, "mean": mean, "std": std, "interpolation": config["interpolation"]}
    return Preprocess({**names, "crop_pct": crop_pct or config["crop_pct"], "crop_mode": config["crop_mode"]})


class Task:
    """The pictures, and what is done to them on their way into a model.

    With timm's augmentation they are decoded by timm's loaders whenever they are needed; with others once, and held as
    bytes.

    Args:
        train: To train on, None where nothing trains.
        test: To test on. Nothing is cut off where none is larger than the input.
        preprocess: What the model expects.
        augment: Of training pictures, as `parse_augment` reads it.
        device: Where models compute, and where decoded pictures are held.
        workers: Processes that decode.
        amp: Whether matrix products are made in bfloat16.
    """

    def __init__(
        self,
        train: Pictures | None,
        test: Pictures,
        preprocess: Preprocess,
        augment: str = "none",
        device: str = "cpu",
        workers: int = 0,
        amp: bool = False,
    ) -> None:
        self.preprocess, self.device, self._workers, self._amp = preprocess, device, workers, amp
        self._kind, self._settings = parse_augment(augment)
        self.count = 0 if train is None else len(train)
        crops = not test.fits(*preprocess.input_size[1:])
        splits = [split for split in (train, test) if split is not None]
        for split in splits:
            split.mode = preprocess.mode
        if self._kind == "timm":
            self._train, self._test = train, self._loader(test, 256, **preprocess.words(crops))
        else:
            self._train, self._test = train and self._held(train, crops=False), self._held(test, crops)
        self.about = {
            "pictures": [split.fingerprint for split in splits],
            "preprocess": preprocess.config,
            "crops": crops,
        }
        self.about |= {"augment": augment, "amp": amp} | ({"workers": workers} if self._kind == "timm" else {})

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products where it is asked for."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self._amp)

    def test_batches(self, batch_size: int = 256) -> Iterator[Batch]:
        """All test pictures; `batch_size` is that of pictures in memory."""
        if self._kind == "timm":
            yield from ((images.to(self.device), labels.to(self.device)) for images, labels in self._test)
        else:
            for images, labels in zip(*(each.split(batch_size) for each in self._test), strict=True):
                yield self.preprocess.normalise(images), labels

    def training_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Augmented batches without end; the seed alone decides them, whatever else draws numbers meanwhile.

        With timm's augmentation the number of workers decides too.

        Raises:
            ValueError: If there are not enough pictures for one batch.
        """
        if self.count < batch_size:
            raise ValueError(f"a batch of {batch_size} needs as many training pictures; there are {self.count}")
        if self._kind == "timm":
            yield from self._by_timm(batch_size, seed)
        draws, (images, labels) = torch.Generator().manual_seed(seed), self._train
        while True:
            order = torch.randperm(self.count, generator=draws)[: self.count // batch_size * batch_size]
            for part in order.to(self.device).split(batch_size):
                batch = images[part]
                if self._kind == "crop-flip":
                    pad = self._settings.get("pad", batch.shape[-1] // 8)
                    batch = crop_flip(batch, pad, self._settings.get("hflip", 0.5), draws)
                yield self.preprocess.normalise(batch), labels[part]

    def _by_timm(self, batch_size: int, seed: int) -> Iterator[Batch]:
        config = {name: self.preprocess.config[name] for name in ("input_size", "mean", "std", "interpolation")}
        try:
            loader = self._loader(self._train, batch_size, is_training=True, **config | self._settings)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"timm.data.create_loader refuses {self._settings}: {error}") from error
        outer = _states()
        random_seed(seed)
        own, batches = _states(), iter(())
        while True:  # what augmentation draws and what the model draws don't mix
            _restore(own)
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            own = _states()
            _restore(outer)
            yield batch[0].to(self.device), batch[1].to(self.device)
            outer = _states()

    def _loader(self, pictures: Pictures, batch_size: int, **settings: Any) -> DataLoader:
        workers = {"num_workers": self._workers, "persistent_workers": False}
        return create_loader(pictures, batch_size=batch_size, use_prefetcher=False, **workers, **settings)

    def _held(self, pictures: Pictures, crops: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """All pictures as uint8 (n, C, H, W), and their labels (n,)."""
        pictures.transform = self.preprocess.transform(crops)
        parts = [*DataLoader(pictures, 256, num_workers=self._workers)]
        return tuple(torch.cat(each).to(self.device) for each in zip(*parts, strict=True))


def parse_augment(text: str) -> tuple[str, dict[str, Any]]:
    """Read "none", "crop-flip,pad=4,hflip=0" or "timm,scale=(0.6,1.0),auto_augment=rand-m9".

    "crop-flip" shifts by up to `pad` pixels (an eighth of the side by default), black where nothing is left, and
    mirrors with probability `hflip` (0.5); "timm" takes the settings of `timm.data.create_loader`.

    Raises:
        ValueError: If there is no such augmentation, or it has no such setting.
    """
    kind, _, rest = text.partition(",")
    settings = parse_fields(rest)
    known = {"none": {}, "crop-flip": {"pad", "hflip"}, "timm": settings.keys()}
    if kind not in known:
        raise ValueError(f"augmentation is one of {', '.join(known)}, got {kind!r}")
    if unknown := settings.keys() - known[kind]:
        raise ValueError(
            f"augmentation {kind} has the settings {sorted(known[kind])}, got {', '.join(sorted(unknown))}"
        )
    is_number = all(isinstance(value, int | float) and value >= 0 for value in settings.values())
    if kind == "crop-flip" and not (is_number and isinstance(settings.get("pad", 0), int)):
        raise ValueError(f"pad is a whole number and hflip a number, both from 0; got {rest!r}")
    return kind, settings


def crop_flip(images: torch.Tensor, pad: int, hflip: float, draws: torch.Generator) -> torch.Tensor:
    """Shift every picture of a batch by its own -pad..pad pixels both ways, and mirror some.

    Args:
        images: (B, C, H, W), any dtype.
        pad: Largest shift in pixels; what moves in is 0.
        hflip: Probability of mirroring left and right, 0..1.
        draws: Generator on the CPU.
    """
    count, _, height, width = images.shape
    rows, columns = torch.randint(0, 2 * pad + 1, (2, count), generator=draws).to(images.device)
    mirrored = (torch.rand(count, generator=draws) < hflip).to(images.device)
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W)
    cut = windows[torch.arange(count, device=images.device), :, rows, columns]
    return torch.where(mirrored[:, None, None, None], cut.flip(3), cut)


def _states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
