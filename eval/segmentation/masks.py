"""Overlap of predicted and true masks, on clean and on corrupted pictures: a part of a bench."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eval.image_classification.sources import UNREADABLE, checksum
from eval.robustness.accuracy import SHOWN
from eval.robustness.bench import Measured, Wanted
from eval.robustness.corruptions import MIN_SIDE, corrupt, package_version, picture_seed, start_worker, warm_up
from eval.robustness.setup import Setup
from eval.segmentation.layouts import Pair, Pairs
from eval.segmentation.scores import IGNORED, confusion, intersection_over_union, mean_iou


class CorruptedPairs(Dataset):
    """Pictures with masks, corrupted at their full size; a key is corruption, severity and number of the pair."""

    def __init__(self, pairs: Sequence[Pair], seed: int, reduces: bool) -> None:
        self.pairs, self.seed, self.reduces = pairs, seed, reduces

    def __getitem__(self, key: tuple[str | None, int, int]) -> tuple[np.ndarray, np.ndarray] | str:
        """Picture (H, W, 3) and mask (H, W), both uint8, or a message where they can't be used."""
        corruption, severity, index = key
        pair = self.pairs[index]
        file = pair.image
        try:
            with Image.open(file) as opened:
                pixels = np.array(opened.convert("RGB"))
            file = pair.mask
            mask = pair.read_mask()
        except UNREADABLE as error:
            return f"{file} can't be decoded: {error}"
        if mask.shape != pixels.shape[:2]:
            return f"{pair.mask} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {pixels.shape[1::-1]}"
        if self.reduces:  # 0 becomes 255, what is left counts from 0
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1).astype(np.uint8)
        if corruption is not None:
            if min(mask.shape) < MIN_SIDE:
                return f"{pair.image} is too small: corruptions need {MIN_SIDE} x {MIN_SIDE}"
            pixels = corrupt(pixels, corruption, severity, picture_seed(self.seed, index, corruption, severity))
        return pixels, mask


class Masks:
    """Cells of one folder of pictures with masks.

    Attributes:
        cells: For every cell's name the corruption, None for none, and its severity.
    """

    def __init__(
        self,
        root: Path,
        found: Pairs,
        cells: Mapping[str, tuple[str | None, int]],
        setup: Setup,
        *,
        reduces: bool = False,
    ) -> None:
        """Describe the cells; `reduces` makes 0 in a mask "no class" and counts the others from 1."""
        self.cells, self._found, self._setup = dict(cells), found, setup
        self._data = CorruptedPairs(found.pairs, setup.seed, reduces)
        self._chosen = setup.choose(len(found.pairs))
        corrupts = any(corruption for corruption, _ in self.cells.values())
        self._library = package_version() if corrupts else None
        self._about = {
            "pictures": found.fingerprint(root),
            "layout": found.layout,
            "chosen": checksum(self._chosen),
            "reduces": reduces,
        }

    def open(self) -> None:
        """Nothing is opened before it is looked at."""

    def close(self) -> None:
        """Nothing stays open."""

    def count(self, cell: str) -> int:
        """Pictures of a cell."""
        return len(self._chosen)

    def settings(self, cell: str) -> dict[str, Any]:
        """All that decides what is measured, the model apart."""
        corruption, severity = self.cells[cell]
        if corruption is None:
            return self._about
        made = {"name": corruption, "severity": severity, "seed": self._setup.seed, "library": self._library}
        return self._about | {"corruption": made}

    @torch.inference_mode()
    def measure(self, wanted: Wanted, models: Sequence[nn.Module], advance: Callable[[str, int], Any]) -> Measured:
        """Test models on cells; every picture is made once for all of them.

        Args:
            wanted: For the name of each cell the numbers of the models.
            models: The models, in eval mode.
            advance: Told of a cell how many more of its pictures are done.

        Yields:
            A cell's name, and for each of its models "miou"; "iou" of every class, None for those that are nowhere;
            "groups", the mIoU of each group of pictures; "tested", "skipped" and "faults".

        Raises:
            UnreadablePictureError: If a picture can't be decoded and such pictures are not to be skipped.
            ValueError: If a mask has values that are no class of the model.
        """
        setup = self._setup
        if any(self.cells[cell][0] == "glass_blur" for cell in wanted):
            warm_up()
        keys = [(*self.cells[cell], int(index)) for cell in wanted for index in self._chosen]
        workers = min(setup.workers, len(keys))
        loader = iter(
            DataLoader(
                self._data,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                collate_fn=_as_it_is,
                worker_init_fn=start_worker,
            )
        )
        for cell, of_models in wanted.items():
            counts: dict[int, dict[str, torch.Tensor]] = {each: {} for each in of_models}
            faults: list[str] = []
            for index in self._chosen:
                item = next(loader)
                if isinstance(item, str):
                    setup.report([item])
                    faults.append(item)
                else:
                    pair = self._found.pairs[index]
                    for each in of_models:
                        found = self._count(models[each], *item, pair)
                        counts[each][pair.group] = counts[each].get(pair.group, 0) + found
                advance(cell, 1)
            if len(faults) == len(self._chosen):
                raise ValueError(f"none of {len(faults)} pictures can be used: {faults[0]}")
            notes = {
                "tested": len(self._chosen) - len(faults),
                "skipped": len(faults),
                "faults": faults[:SHOWN],
            }
            yield cell, {each: _figures(counts[each]) | notes for each in of_models}

    def _count(self, model: nn.Module, pixels: np.ndarray, mask: np.ndarray, pair: Pair) -> torch.Tensor:
        with self._setup.autocast():
            predicted = model(pixels, mask.shape)
        true = torch.from_numpy(mask).long().to(predicted.device)
        try:
            return confusion(predicted, true, len(model.class_names)).cpu()
        except ValueError as error:
            raise ValueError(f"{pair.mask}: {error}") from error


def _figures(by_group: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    ious = intersection_over_union(sum(by_group.values()))
    if mean_iou(ious) is None:
        raise ValueError(f"every pixel of every mask is {IGNORED}, which is left out")
    groups = {group: mean_iou(intersection_over_union(counts)) for group, counts in sorted(by_group.items()) if group}
    return {"miou": mean_iou(ious), "iou": ious, "groups": groups}


def _as_it_is(item: Any) -> Any:
    return item
