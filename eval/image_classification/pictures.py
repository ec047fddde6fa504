"""Pictures as batches of uint8 tensors: decoded once and held in memory where they fit, else decoded as they come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from eval.image_classification.preprocess import Transform
from eval.image_classification.randomness import seeded
from eval.image_classification.sources import UNREADABLE, Source

Batch = tuple[torch.Tensor, torch.Tensor]  # pictures (B, C, H, W) uint8, labels (B,) int64


class UnreadablePictureError(ValueError):
    """A picture can't be decoded."""


class Decoded(Dataset):
    """Pictures of a source through a transform; a key is a picture's number, and a seed if the transform is random."""

    def __init__(self, source: Source, mode: str, transform: Transform) -> None:
        self.source, self.mode, self.transform = source, mode, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[torch.Tensor, int] | str:
        """The picture (C, H, W) uint8 and its label, or a message where it can't be decoded."""
        index, seed = key
        try:
            with self.source.open(index) as opened:
                image = opened.convert(self.mode)
        except UNREADABLE as error:
            return f"{self.source.name(index)} can't be decoded: {error}"
        with nullcontext() if seed is None else seeded(seed):
            return self.transform(image), int(self.source.labels[index])


class Pictures:
    """One split of the data, ready to be taken in batches.

    Attributes:
        decoded: Every picture through its transform.
        drops: Whether pictures that can't be decoded are left out and counted, instead of an error.
        dropped: What was wrong with those met so far, one message each.
        images: All pictures (n, C, H, W) uint8 where they are held in memory, else None.
        labels: Their labels (n,) int64, else None.
    """

    def __init__(self, decoded: Decoded, *, drops: bool = False, workers: int = 0) -> None:
        self.decoded, self.drops, self.workers = decoded, drops, workers
        self.dropped: set[str] = set()
        self.images: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.decoded) if self.images is None else len(self.images)

    def hold(self, device: torch.device, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Decode all pictures and hold them on a device; `advance` is told how many more are done."""
        held: torch.Tensor | None = None
        labels = torch.empty(len(self.decoded), dtype=torch.int64, device=device)
        count = 0
        for images, part in self._decode(torch.arange(len(self.decoded)).split(256), None):
            if held is None:
                held = torch.empty(len(self.decoded), *images.shape[1:], dtype=images.dtype, device=device)
            held[count : count + len(part)], labels[count : count + len(part)] = images, part
            count += len(part)
            advance(len(part))
        if held is None:
            raise UnreadablePictureError(f"none of {len(self.decoded)} pictures can be decoded: {min(self.dropped)}")
        self.images, self.labels = held[:count], labels[:count]

    def batches(self, order: torch.Tensor, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches in an order.

        Args:
            order: Numbers of pictures in 0..len - 1, int64.
            batch_size: Pictures of a batch; the last may be smaller, and so are those with dropped pictures.
            seed: Of the transform's random choices; None for a transform that makes none.
        """
        if self.images is None:
            yield from self._decode(order.split(batch_size), seed)
        else:
            for part in order.to(self.images.device).split(batch_size):
                yield self.images[part], self.labels[part]

    def _decode(self, parts: Sequence[torch.Tensor], seed: int | None) -> Iterator[Batch]:
        first = None if seed is None else seed * len(self.decoded)
        keys = [[(index, None if first is None else first + index) for index in part.tolist()] for part in parts]
        loader = DataLoader(self.decoded, batch_sampler=keys, num_workers=self.workers, collate_fn=collate)
        for images, labels, faults in loader:
            if faults and not self.drops:
                raise UnreadablePictureError(f"{faults[0]}; --on-bad-image drop leaves such pictures out")
            self.dropped.update(faults)
            if len(images):
                yield images, labels


def collate(items: Sequence[tuple[torch.Tensor, int] | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Put pictures into a batch; returns pictures (B, C, H, W), labels (B,), and the messages among the items."""
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [item for item in items if isinstance(item, str)]
