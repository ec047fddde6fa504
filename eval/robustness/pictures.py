"""Cells of pictures that are classified: clean ones, corrupted ones, those of a folder, and sequences of frames."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.task.evaluator import ClassificationEvaluator
from timm.utils import natural_key
from torch import nn
from torch.utils.data import Dataset

from eval.image_classification.data import UNREADABLE, FolderPictures, Pictures, UnreadablePictureError, checksum
from eval.robustness.bench import Cell, Setup
from eval.robustness.classifiers import Classifiers, match_outputs
from eval.robustness.corruptions import MIN_SIDE, corrupt, describe, picture_seed
from eval.robustness.scores import flip_share, is_noise

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
FRAMES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


@dataclass
class Corrupted(Dataset):
    """Pictures (C, H, W) uint8 with their labels, corrupted as the model's input or before they are resized."""

    pictures: Pictures
    transform: Callable[[Image.Image], torch.Tensor]
    corruption: str | None
    severity: int
    seed: int
    of: str

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.pictures.decode(index), int(self.pictures.labels[index])
        if self.corruption is None:
            return self.transform(image), label
        how = self.corruption, self.severity, picture_seed(self.seed, index, self.corruption, self.severity)
        if self.of == "picture":
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"{self.pictures.name(index)} is too small: corruptions need {MIN_SIDE} x {MIN_SIDE}")
            return self.transform(Image.fromarray(corrupt(np.asarray(image), *how))), label
        pixels = self.transform(image).permute(1, 2, 0).numpy()  # (H, W, C)
        made = torch.from_numpy(corrupt(pixels[..., 0] if pixels.shape[2] == 1 else pixels, *how))
        return (made[None] if made.ndim == 2 else made.permute(2, 0, 1)), label


@dataclass
class Accuracy:
    """A cell of pictures with labels: top-1 and, with more than five classes to choose from, top-5 accuracy.

    Attributes:
        name: Of the cell.
        source: Opens the pictures.
        classifiers: Whose preprocessing and outputs they are for.
        setup: Of the bench.
        how: The corruption and its severity.
        of: What is corrupted, "input" or "picture".
        is_subset: Whether answers are chosen among the classes of the source alone, as for ImageNet-A and -R.
    """

    name: str
    source: Callable[[], Pictures]
    classifiers: Classifiers
    setup: Setup
    how: tuple[str | None, int] = (None, 0)
    of: str = "input"
    is_subset: bool = False
    outputs: torch.Tensor | None = field(default=None, init=False)

    def open(self) -> dict[str, Any]:
        preprocess, (corruption, severity) = self.classifiers.preprocess, self.how
        size = preprocess.input_size[1:]
        if corruption and self.of == "input" and min(size) < MIN_SIDE:
            raise ValueError(
                f"the model's input is {size[0]} x {size[1]}, corruptions need {MIN_SIDE} x {MIN_SIDE}: with --corrupt "
                "picture they are made before pictures are resized"
            )
        pictures = match_outputs(self.source(), self.classifiers, self.name)
        pictures.mode = preprocess.mode
        crops = self.classifiers.always_crops or not pictures.fits(*size)
        made = describe(corruption, severity, self.setup.seed, self.of) if corruption else None
        transform = preprocess.transform(crops)
        self._data = Corrupted(pictures, transform, corruption, severity, self.setup.seed, self.of)
        self._chosen = self.setup.choose(len(pictures))
        self.outputs = torch.from_numpy(np.unique(pictures.labels)).to(self.setup.device) if self.is_subset else None
        about = {"pictures": pictures.fingerprint, "labels": checksum(pictures.labels), "chosen": len(self._chosen)}
        return about | {"crops": crops, "subset": self.is_subset, "corruption": made}

    def batches(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.setup.load(self._data, self._chosen, self.setup.batch_size):
            yield self.classifiers.preprocess.normalise(images.to(self.setup.device)), labels.to(self.setup.device)

    def tally(self, module: nn.Module) -> Hits:
        return Hits(self.setup, self.outputs)


class Hits:
    """Counts right answers of one model; `outputs` are those to choose from, ascending (K,), None for all."""

    def __init__(self, setup: Setup, outputs: torch.Tensor | None) -> None:
        self.setup, self.outputs, self.classes = setup, outputs, 0
        self.evaluator = ClassificationEvaluator(setup.device)

    def update(self, module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        images, labels = batch
        scores = answer(module, images, self.setup)
        if self.outputs is not None:
            scores, labels = scores[:, self.outputs], torch.searchsorted(self.outputs, labels)
        self.classes = scores.shape[1]
        self.evaluator.update(scores, labels)

    def compute(self) -> dict[str, Any]:
        found = self.evaluator.compute()
        names = ("top1", "top5") if self.classes > 5 else ("top1",)
        return {name: found[name] / 100 for name in names} | {"tested": self.evaluator.num_samples}


def answer(module: nn.Module, images: torch.Tensor, setup: Setup) -> torch.Tensor:
    """Scores of the classes, (B, outputs), of a timm or a Hugging Face model."""
    with setup.autocast():
        output = module(images)
    return output if isinstance(output, torch.Tensor) else output.logits


@dataclass
class Flips:
    """A cell of one perturbation of ImageNet-P: how often the answer changes along videos or folders of frames."""

    name: str
    folder: Path
    classifiers: Classifiers
    setup: Setup

    def open(self) -> dict[str, Any]:
        paths = find_sequences(self.folder)
        self._paths = [paths[index] for index in self.setup.choose(len(paths))]
        preprocess = self.classifiers.preprocess
        first, (height, width) = next(read_frames(self._paths[0])), preprocess.input_size[1:]
        crops = self.classifiers.always_crops or first.height > height or first.width > width  # all are of one size
        self._data = Sequences(self._paths, preprocess.mode, preprocess.transform(crops))
        listing = "\n".join(f"{path.relative_to(self.folder)} {_size(path)}" for path in self._paths)
        return {"sequences": f"{zlib.crc32(listing.encode()):08x}", "crops": crops, "noise": is_noise(self.folder.name)}

    def batches(self) -> Iterable[torch.Tensor]:
        for frames in self.setup.load(self._data, range(len(self._paths))):
            yield self.classifiers.preprocess.normalise(frames.to(self.setup.device))

    def tally(self, module: nn.Module) -> Changes:
        return Changes(self.setup, is_noise(self.folder.name))


class Changes:
    """Counts changed answers of one model: the mean over sequences of the share of frames whose answer changed."""

    def __init__(self, setup: Setup, compare_with_first: bool) -> None:
        self.setup, self.compare_with_first, self.shares = setup, compare_with_first, []

    def update(self, module: nn.Module, frames: torch.Tensor) -> None:
        parts = [answer(module, part, self.setup).argmax(1) for part in frames.split(self.setup.batch_size)]
        self.shares.append(flip_share(torch.cat(parts).tolist(), self.compare_with_first))

    def compute(self) -> dict[str, Any]:
        return {"flip_rate": float(np.mean(self.shares)), "tested": len(self.shares)}


@dataclass
class Sequences(Dataset):
    """Sequences of frames, (T, C, H, W) uint8, T at least 2."""

    paths: Sequence[Path]
    mode: str
    transform: Callable[[Image.Image], torch.Tensor]

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        try:
            frames = [self.transform(frame.convert(self.mode)) for frame in read_frames(path)]
        except UNREADABLE as error:
            raise UnreadablePictureError(f"{path} can't be decoded: {error}") from error
        if len(frames) < 2:
            raise UnreadablePictureError(f"{path} holds {len(frames)} frames, it takes 2 to compare")
        return torch.stack(frames)


def find_sequences(folder: Path) -> list[Path]:
    """Videos, and folders that hold pictures, anywhere below a folder; sorted."""
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS]
    frames = {path.parent for path in folder.rglob("*") if path.suffix.lower() in FRAMES}
    if not videos and not frames:
        raise ValueError(f"{folder} holds neither videos ({', '.join(VIDEOS)}) nor folders of frames")
    return sorted([*videos, *frames])


def read_frames(path: Path) -> Iterator[Image.Image]:
    """Frames of a video, or of a folder of pictures in the order of the numbers in their names, RGB."""
    if path.is_dir():
        for file in sorted(
            (each for each in path.iterdir() if each.suffix.lower() in FRAMES), key=lambda file: natural_key(file.name)
        ):
            with Image.open(file) as image:
                yield image.convert("RGB")
        return
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise OSError("it is no video that OpenCV can read")
        while (grabbed := video.read())[0]:
            yield Image.fromarray(cv2.cvtColor(grabbed[1], cv2.COLOR_BGR2RGB))
    finally:
        video.release()


def plan_cells(
    classifiers: Classifiers,
    setup: Setup,
    clean: Pictures | None,
    corruptions: Mapping[str, tuple[str, int]],
    of: str,
    *,
    imagenet_c: Path | None = None,
    subsets: Sequence[str] = (),
    imagenet_p: Path | None = None,
) -> list[Cell]:
    """Make the cells.

    Clean pictures are corrupted where no ImageNet-C folder has them, CORRUPTION/SEVERITY/CLASS/FILE or these in folders
    of their own. `subsets` are "NAME=FOLDER", and ImageNet-P is PERTURBATION/CLASS/SEQUENCE.

    Raises:
        OSError: If a folder is not there.
        ValueError: If a subset is written otherwise, or a name comes twice.
    """
    cells: list[Cell] = []
    common = {"classifiers": classifiers, "setup": setup}
    if clean is not None:
        cells.append(Accuracy("clean", lambda: clean, **common))
    if clean is not None and imagenet_c is None:
        cells += [Accuracy(name, lambda: clean, **common, how=how, of=of) for name, how in corruptions.items()]
    for name, (corruption, severity) in corruptions.items() if imagenet_c is not None else ():
        found = [imagenet_c / corruption / str(severity), *sorted(imagenet_c.glob(f"*/{corruption}/{severity}"))]
        folder = next((each for each in found if each.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"there is no folder {found[0]}; --corruptions and --severities say which to take")
        cells.append(Accuracy(name, partial(FolderPictures, folder), **common))
    for text in subsets:
        name, equals, folder = text.partition("=")
        if not equals or not name or f"subset/{name}" in [cell.name for cell in cells]:
            raise ValueError(f"--subset is written NAME=FOLDER, every name once, got {text!r}")
        source = partial(FolderPictures, Path(folder))
        cells.append(Accuracy(f"subset/{name}", source, **common, is_subset=True))
    if imagenet_p is not None:
        folders = sorted(each for each in imagenet_p.iterdir() if each.is_dir())
        cells += [Flips(f"flips/{each.name}", each, **common) for each in folders]
    return cells


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size
