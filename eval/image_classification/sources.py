"""Labelled pictures that are opened one at a time, and folders of them; `npz.py` has those of npz files."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

# What Pillow raises for files that are no pictures, cut short, or broken inside.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Source:
    """Pictures with labels.

    Attributes:
        labels: Class numbers, (n,), int64.
        classes: Names of the classes, None where the data don't name them.
        fingerprint: Changes with the pictures and labels; for folders with names and sizes of the files.
    """

    labels: np.ndarray
    classes: list[str] | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Open a picture, perhaps without decoding it yet; raises one of `UNREADABLE` if that fails."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        raise NotImplementedError

    def fits(self, height: int, width: int) -> bool:
        """Whether no picture is larger than this; looks at pictures until one is."""
        for index in range(len(self)):
            try:
                with self.open(index) as image:
                    if image.height > height or image.width > width:
                        return False
            except UNREADABLE:
                continue  # whoever decodes it says so
        return True


class FolderSource(Source):
    """A folder whose subfolders are classes, as torchvision's ImageFolder finds them."""

    def __init__(self, root: Path) -> None:
        folder = ImageFolder(root)  # says itself which class has no pictures
        self.paths = [path for path, _ in folder.samples]
        self.labels, self.classes = np.array(folder.targets, np.int64), folder.classes
        listing = "\n".join(f"{Path(path).relative_to(root)} {Path(path).stat().st_size}" for path in self.paths)
        self.fingerprint = f"{zlib.crc32(listing.encode()):08x}"

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]


class Subset(Source):
    """Some of the pictures of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.labels, self.classes = source.labels[indices], source.classes
        self.fingerprint = f"{source.fingerprint}-{checksum(indices)}"

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Split a source at random, always alike, into what is trained on and the share that is kept from training."""
    order = np.random.default_rng(0).permutation(len(source))
    count = round(share * len(source))
    if not 0 < count < len(source):
        raise ValueError(f"a share of {share} of {len(source)} pictures leaves none on one side")
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def checksum(*arrays: np.ndarray) -> str:
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), zlib.crc32(str(array.shape).encode(), total))
    return f"{total:08x}"
