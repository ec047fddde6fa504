"""Accuracy on a source of pictures, as they are and corrupted: one part of a bench, whose cells share the source."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eval.image_classification.pictures import collate
from eval.image_classification.preprocess import Transform
from eval.image_classification.sources import UNREADABLE, Source, checksum
from eval.robustness.bench import Measured, Wanted
from eval.robustness.classes import match_outputs
from eval.robustness.classifiers import logits
from eval.robustness.corruptions import MIN_SIDE, corrupt, package_version, picture_seed, start_worker, warm_up
from eval.robustness.setup import ClassifierSetup

Key = tuple[str | None, int, int]  # corruption, severity, number of the picture
TOP = 5
SHOWN = 3  # messages about unreadable pictures that are kept


class Corrupted(Dataset):
    """Pictures of a source, corrupted and prepared for a model; a key says which and how."""

    def __init__(self, source: Source, mode: str, transform: Transform, seed: int, corrupts_input: bool) -> None:
        self.source, self.mode, self.transform = source, mode, transform
        self.seed, self.corrupts_input = seed, corrupts_input

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int] | str:
        """The picture (C, H, W) uint8 and its label, or a message where it can't be decoded or is too small."""
        corruption, severity, index = key
        try:
            with self.source.open(index) as opened:
                image = opened.convert(self.mode)
        except UNREADABLE as error:
            return f"{self.source.name(index)} can't be decoded: {error}"
        label = int(self.source.labels[index])
        if corruption is None:
            return self.transform(image), label
        seed = picture_seed(self.seed, index, corruption, severity)
        if self.corrupts_input:
            pixels = self.transform(image).permute(1, 2, 0).numpy()  # (H, W, C)
            pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
            corrupted = torch.from_numpy(corrupt(pixels, corruption, severity, seed))
            return (corrupted[None] if corrupted.ndim == 2 else corrupted.permute(2, 0, 1)), label
        if min(image.size) < MIN_SIDE:
            return f"{self.source.name(index)} is too small: corruptions need {MIN_SIDE} x {MIN_SIDE}"
        return self.transform(Image.fromarray(corrupt(np.asarray(image), corruption, severity, seed))), label


class Accuracy:
    """Cells of one source of pictures.

    Attributes:
        name: What the source is, for messages.
        cells: For every cell's name the corruption, None for none, and its severity.
    """

    def __init__(
        self,
        name: str,
        opener: Callable[[], Source],
        cells: Mapping[str, tuple[str | None, int]],
        setup: ClassifierSetup,
        *,
        is_subset: bool = False,
        is_cropped: bool | None = None,
    ) -> None:
        """Describe the cells; nothing is opened yet.

        Args:
            name: See above.
            opener: Opens the source.
            cells: See above.
            setup: Of the bench.
            is_subset: Whether answers are chosen among the classes of the source alone, as for ImageNet-A and -R.
            is_cropped: Whether the model's own crop is made, unless it always is; by default where one of some pictures
                is larger than the model's input.
        """
        self.name, self.cells, self._opener, self._setup = name, dict(cells), opener, setup
        self._is_subset, self._is_cropped = is_subset, is_cropped
        corrupts = any(corruption for corruption, _ in self.cells.values())
        _, height, width = setup.classifiers.preprocess.input_size
        if corrupts and setup.corrupts_input and min(height, width) < MIN_SIDE:
            raise ValueError(
                f"the model's input is {height} x {width}, corruptions need {MIN_SIDE} x {MIN_SIDE}: with --corrupt "
                "picture they are made before pictures are resized"
            )
        self._library = package_version() if corrupts else None

    def open(self) -> None:
        """Open the source.

        Raises:
            OSError: If it isn't there.
            ValueError: If its classes are not the model's.
        """
        setup = self._setup
        source = self._opener()
        source = match_outputs(source, setup.names, setup.classifiers.num_outputs, self.name)
        self._chosen = setup.choose(len(source))
        preprocess = setup.classifiers.preprocess
        is_cropped = True if setup.classifiers.always_crops else self._is_cropped
        if is_cropped is None:
            is_cropped = not _fits(source, *preprocess.input_size[1:])
        transform = preprocess.test_transform() if is_cropped else preprocess.whole_transform()
        self._data = Corrupted(source, preprocess.mode, transform, setup.seed, setup.corrupts_input)
        self._outputs = torch.from_numpy(np.unique(source.labels)) if self._is_subset else None
        self._about = {
            "pictures": source.fingerprint,
            "labels": checksum(source.labels),
            "chosen": checksum(self._chosen),
            "cropped": is_cropped,
            "classes": None if self._outputs is None else len(self._outputs),
        }

    def close(self) -> None:
        """Let go of the source."""
        del self._data

    def count(self, cell: str) -> int:
        """Pictures of a cell."""
        return len(self._chosen)

    def settings(self, cell: str) -> dict[str, Any]:
        """All that decides what is measured, the model apart."""
        corruption, severity = self.cells[cell]
        if corruption is None:
            return self._about
        made = {"name": corruption, "severity": severity, "seed": self._setup.seed, "library": self._library}
        return self._about | {"corruption": made | {"of": "input" if self._setup.corrupts_input else "picture"}}

    @torch.inference_mode()
    def measure(self, wanted: Wanted, models: Sequence[nn.Module], advance: Callable[[str, int], Any]) -> Measured:
        """Test models on cells; every picture is made once for all of them.

        Args:
            wanted: For the name of each cell the numbers of the models.
            models: The models, in eval mode.
            advance: Told of a cell how many more of its pictures are done.

        Yields:
            A cell's name, and for each of its models "top1" and, with more than five classes to choose from, "top5" as
            shares; "tested", "skipped" and "faults": how many pictures were, and what was wrong with the first of them.

        Raises:
            UnreadablePictureError: If a picture can't be decoded and such pictures are not to be skipped.
        """
        setup = self._setup
        numbers = torch.from_numpy(self._chosen).split(setup.batch_size)
        if any(self.cells[cell][0] == "glass_blur" for cell in wanted):
            warm_up()
        batches = [[(*self.cells[cell], int(index)) for index in part] for cell in wanted for part in numbers]
        loader = iter(
            DataLoader(
                self._data,
                batch_sampler=batches,
                num_workers=min(setup.workers, len(batches)),
                collate_fn=collate,
                worker_init_fn=start_worker,
            )
        )
        outputs = None if self._outputs is None else self._outputs.to(setup.device)
        for cell, of_models in wanted.items():
            tallies = {each: _Tally(outputs) for each in of_models}
            faults: list[str] = []
            for _ in numbers:
                images, labels, bad = next(loader)
                setup.report(bad)
                faults += bad
                if len(images):
                    prepared = setup.classifiers.preprocess.normalise(images.to(setup.device))
                    labels = labels.to(setup.device)
                    for each, tally in tallies.items():
                        with setup.autocast():
                            scores = logits(models[each], prepared)
                        tally.add(scores.float(), labels)
                advance(cell, len(images) + len(bad))
            if len(faults) == len(self._chosen):
                raise ValueError(f"none of {len(faults)} pictures of {self.name} can be used: {faults[0]}")
            notes = {"skipped": len(faults), "faults": faults[:SHOWN]}
            yield cell, {each: tally.figures() | notes for each, tally in tallies.items()}


class _Tally:
    """Hits of one model; `outputs` are those to choose from, ascending (K,), None for all."""

    def __init__(self, outputs: torch.Tensor | None) -> None:
        self.outputs, self.count, self.hits, self.hits_top, self.num_classes = outputs, 0, 0, 0, 0

    def add(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: scores (B, outputs), labels (B,) numbers of outputs."""
        if self.outputs is not None:
            scores, labels = scores[:, self.outputs], torch.searchsorted(self.outputs, labels)
        hits = scores.topk(min(TOP, scores.shape[1])).indices == labels[:, None]  # (B, 5)
        self.num_classes = scores.shape[1]
        self.count += len(labels)
        self.hits += int(hits[:, 0].sum())
        self.hits_top += int(hits.sum())

    def figures(self) -> dict[str, Any]:
        figures = {"top1": self.hits / self.count, "tested": self.count}
        return figures | ({"top5": self.hits_top / self.count} if self.num_classes > TOP else {})


def _fits(source: Source, height: int, width: int, looks: int = 32) -> bool:
    """Whether none of some pictures, spread over the source, is larger than this."""
    for index in np.unique(np.linspace(0, len(source) - 1, looks).astype(int)):
        try:
            with source.open(index) as image:
                if image.height > height or image.width > width:
                    return False
        except UNREADABLE:
            continue  # whoever decodes it says so
    return True
