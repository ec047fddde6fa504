"""How often the answer changes along sequences of slightly changing pictures: ImageNet-P, a part of a bench."""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eval.image_classification.preprocess import Transform
from eval.image_classification.sources import UNREADABLE, checksum
from eval.robustness.accuracy import SHOWN
from eval.robustness.bench import Measured, Wanted
from eval.robustness.classifiers import logits
from eval.robustness.corruptions import start_worker
from eval.robustness.scores import flip_share, is_noise
from eval.robustness.setup import ClassifierSetup

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


class Sequences(Dataset):
    """Sequences of pictures: videos, or folders of frames in the order of the numbers in their names."""

    def __init__(self, paths: Sequence[Path], mode: str, transform: Transform) -> None:
        self.paths, self.mode, self.transform = paths, mode, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        """The frames (T, C, H, W) uint8, T at least 2, or a message where they can't be decoded."""
        path = self.paths[index]
        try:
            frames = [self.transform(frame.convert(self.mode)) for frame in read_frames(path)]
        except UNREADABLE as error:
            return f"{path} can't be decoded: {error}"
        return torch.stack(frames) if len(frames) > 1 else f"{path} holds {len(frames)} frames, it takes 2 to compare"


class Flips:
    """Cells of an ImageNet-P folder, PERTURBATION/CLASS/SEQUENCE with a video or a folder of frames as a sequence.

    Attributes:
        name: What it is, for messages.
        cells: For every cell's name the perturbation.
    """

    def __init__(self, root: Path, setup: ClassifierSetup) -> None:
        """Find the perturbations.

        Raises:
            OSError: If there is no such folder.
            ValueError: If it holds no sequences.
        """
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}, which should hold ImageNet-P")
        self.name, self._root, self._setup = str(root), root, setup
        found = sorted(each.name for each in root.iterdir() if each.is_dir())
        self.cells = {f"flips/{name}": name for name in found}
        if not found:
            raise ValueError(f"{root} has no folders; ImageNet-P is kept as PERTURBATION/CLASS/SEQUENCE")

    def open(self) -> None:
        """List the sequences."""
        setup, preprocess = self._setup, self._setup.classifiers.preprocess
        self._paths: dict[str, list[Path]] = {}
        self._about: dict[str, dict[str, Any]] = {}
        self._transforms: dict[str, Transform] = {}
        for cell, name in self.cells.items():
            paths = find_sequences(self._root / name)
            chosen = [paths[index] for index in setup.choose(len(paths))]
            is_cropped = setup.classifiers.always_crops or not _fits(chosen, *preprocess.input_size[1:])
            listing = "\n".join(f"{path.relative_to(self._root)} {_size(path)}" for path in chosen)
            self._paths[cell] = chosen
            self._transforms[cell] = preprocess.test_transform() if is_cropped else preprocess.whole_transform()
            self._about[cell] = {
                "sequences": f"{zlib.crc32(listing.encode()):08x}",
                "chosen": checksum(np.array([len(paths), len(chosen)])),
                "cropped": is_cropped,
                "compare_with": "first" if is_noise(name) else "previous",
            }

    def close(self) -> None:
        """Let go of the sequences."""
        del self._paths

    def count(self, cell: str) -> int:
        """Sequences of a cell."""
        return len(self._paths[cell])

    def settings(self, cell: str) -> dict[str, Any]:
        """All that decides what is measured, the model apart."""
        return self._about[cell]

    @torch.inference_mode()
    def measure(self, wanted: Wanted, models: Sequence[nn.Module], advance: Callable[[str, int], Any]) -> Measured:
        """Count changed answers; see `Accuracy.measure`.

        Yields:
            A cell's name, and for each of its models "flip_rate", the mean over sequences of the share of frames whose
            answer changed; "tested", "skipped" and "faults".
        """
        setup = self._setup
        for cell, of_models in wanted.items():
            data = Sequences(self._paths[cell], setup.classifiers.preprocess.mode, self._transforms[cell])
            loader = DataLoader(
                data, batch_size=None, num_workers=min(setup.workers, len(data)), worker_init_fn=start_worker
            )
            shares: dict[int, list[float]] = {each: [] for each in of_models}
            faults: list[str] = []
            for frames in loader:
                if isinstance(frames, str):
                    setup.report([frames])
                    faults.append(frames)
                else:
                    for each in of_models:
                        answers = self._answers(models[each], frames)
                        shares[each].append(flip_share(answers, is_noise(self.cells[cell])))
                advance(cell, 1)
            if len(faults) == len(data):
                raise ValueError(f"none of {len(faults)} sequences of {self.cells[cell]} can be used: {faults[0]}")
            notes = {"tested": len(data) - len(faults), "skipped": len(faults), "faults": faults[:SHOWN]}
            yield cell, {each: {"flip_rate": float(np.mean(shares[each])), **notes} for each in of_models}

    def _answers(self, model: nn.Module, frames: torch.Tensor) -> list[int]:
        setup, answers = self._setup, []
        for part in frames.split(setup.batch_size):
            with setup.autocast():
                scores = logits(model, setup.classifiers.preprocess.normalise(part.to(setup.device)))
            answers += scores.argmax(1).tolist()
        return answers


def find_sequences(folder: Path) -> list[Path]:
    """Videos, and folders that hold pictures, anywhere below a folder; sorted.

    Raises:
        ValueError: If there are none.
    """
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS]
    frames = {path.parent for path in folder.rglob("*") if path.suffix.lower() in PICTURES}
    if not videos and not frames:
        raise ValueError(f"{folder} holds neither videos ({', '.join(VIDEOS)}) nor folders of frames")
    return sorted([*videos, *frames])


def read_frames(path: Path) -> Iterator[Image.Image]:
    """Frames of a video, or of a folder of pictures, in order, RGB.

    Raises:
        OSError: If it is no video, or a picture can't be decoded.
    """
    if path.is_dir():
        for file in sorted((each for each in path.iterdir() if each.suffix.lower() in PICTURES), key=_natural):
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


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which frame10 comes after frame9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _fits(paths: Sequence[Path], height: int, width: int) -> bool:
    """Whether the first frame that can be decoded isn't larger than this; all are of one size."""
    for path in paths:
        try:
            frame = next(read_frames(path), None)
        except UNREADABLE:
            continue  # whoever decodes it says so
        if frame is not None:
            return frame.height <= height and frame.width <= width
    return True


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size
