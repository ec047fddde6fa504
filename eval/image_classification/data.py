"""Labelled pictures: folders of classes, npz files of pixels or of JPEG bytes, and the digits of scikit-learn."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

# What Pillow raises for files that are no pictures, cut short, or broken inside.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
TEST_FOLDERS = ("val", "validation", "test")


class UnreadablePictureError(ValueError):
    """A picture can't be decoded."""


class Pictures(Dataset):
    """Pictures with labels; `create_loader` of timm sets `transform`.

    Attributes:
        labels: Class numbers, (n,), int64.
        classes: Names of the classes, None where the data don't name them.
        fingerprint: Changes with the pictures and labels; for folders with names and sizes of the files.
        transform: From a picture of `mode` to what an item is.
        mode: What a picture is converted to, as Pillow names it.
    """

    transform: Callable[[Image.Image], Any] = staticmethod(lambda image: image)
    mode = "RGB"

    def __init__(self, labels: np.ndarray, classes: list[str] | None, fingerprint: str) -> None:
        self.labels, self.classes, self.fingerprint = labels, classes, fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Open a picture, perhaps without decoding it yet; raises one of `UNREADABLE` if that fails."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        raise NotImplementedError

    def decode(self, index: int) -> Image.Image:
        """A picture in the mode.

        Raises:
            UnreadablePictureError: If it can't be decoded, naming it.
        """
        try:
            with self.open(index) as opened:
                return opened.convert(self.mode)
        except UNREADABLE as error:
            raise UnreadablePictureError(f"{self.name(index)} can't be decoded: {error}") from error

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.decode(index)), int(self.labels[index])

    def fits(self, height: int, width: int, looks: int = 256) -> bool:
        """Whether no picture, of some that are spread over all, is larger than this."""
        for index in np.unique(np.linspace(0, len(self) - 1, looks).astype(int)):
            try:
                with self.open(index) as image:
                    if image.height > height or image.width > width:
                        return False
            except UNREADABLE:
                continue  # whoever decodes it says so
        return True


class FolderPictures(Pictures):
    """A folder whose subfolders are classes, as torchvision's ImageFolder finds them."""

    def __init__(self, root: Path) -> None:
        folder = ImageFolder(root)  # says itself which class has no pictures
        self.paths = [path for path, _ in folder.samples]
        listing = "\n".join(f"{Path(path).relative_to(root)} {Path(path).stat().st_size}" for path in self.paths)
        super().__init__(np.array(folder.targets, np.int64), folder.classes, f"{zlib.crc32(listing.encode()):08x}")

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]


class ArrayPictures(Pictures):
    """Pictures as one array of bytes.

    Args:
        images: (n, H, W) or (n, H, W, C) uint8, C being 1, 3 or 4; or, with offsets, JPEG bytes (bytes,) uint8.
        labels: (n,), whole numbers.
        classes: Names of the classes.
        where: What they are called in messages.
        offsets: (n + 1,): where the bytes of each picture begin, and the end.

    Raises:
        ValueError: If the arrays don't fit each other.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: list[str] | None = None,
        where: str = "memory",
        offsets: np.ndarray | None = None,
    ) -> None:
        is_pixels = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
        if images.dtype != np.uint8 or not (is_pixels if offsets is None else images.ndim == 1):
            shape = "(n, H, W) or (n, H, W, C) with C = 1, 3 or 4" if offsets is None else "(bytes,)"
            raise ValueError(f"{where}: pictures must be uint8 {shape}, got {images.dtype} {images.shape}")
        count = len(images) if offsets is None else len(offsets) - 1
        if offsets is not None and ([*offsets[:1], *offsets[-1:]] != [0, len(images)] or (np.diff(offsets) < 0).any()):
            raise ValueError(f"{where}: offsets must be n + 1 numbers that rise from 0 to {len(images)}, the bytes")
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or not count:
            raise ValueError(f"{where}: labels must be {count} whole numbers, got {labels.dtype} {labels.shape}")
        top = len(classes) if classes is not None else int(labels.max()) + 1
        if labels.min() < 0 or labels.max() >= top:
            raise ValueError(f"{where}: labels must be in 0..{top - 1}, got {labels.min()}..{labels.max()}")
        arrays = [images, labels] if offsets is None else [images, labels, offsets]
        super().__init__(labels.astype(np.int64), classes, checksum(*arrays))
        self.images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        self.offsets, self.where = None if offsets is None else offsets.astype(np.int64), where

    def open(self, index: int) -> Image.Image:
        if self.offsets is None:
            return Image.fromarray(self.images[index])
        return Image.open(io.BytesIO(self.images[self.offsets[index] : self.offsets[index + 1]].tobytes()))

    def name(self, index: int) -> str:
        return f"picture {index} of {self.where}"


def digits(split: str) -> ArrayPictures:
    """scikit-learn's 1,797 handwritten digits, four times as large (32 x 32); every fifth is a test picture."""
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = (np.arange(len(found.target)) % 5 == 0) == (split == "test")
    small = (found.images[chosen] * 15.9).astype(np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in small]
    return ArrayPictures(np.stack(large), found.target[chosen], list("0123456789"), f"digits, {split}")


def open_pictures(data: str, split: str) -> Pictures:
    """Open the "train" or the "test" pictures of what `--data` or `--test` names.

    Args:
        data: "digits"; a folder with train/ and one of val/, validation/ and test/ with a subfolder per class each, or
            with a subfolder per class; or an npz file: images or jpeg with offsets, labels, perhaps classes, with
            train_ and test_ before the names where it holds both.
        split: Which.

    Raises:
        OSError: If there are no such pictures.
        ValueError: If it isn't clear which are meant, or they don't fit each other.
    """
    path = Path(data)
    if data == "digits":
        return digits(split)
    if path.is_dir():
        names = ("train",) if split == "train" else TEST_FOLDERS
        found = [path / name for name in names if (path / name).is_dir()]
        if len(found) > 1:
            raise ValueError(f"{path} has {', '.join(each.name for each in found)}: say which to test on with --test")
        if not found and any((path / name).is_dir() for name in ("train", *TEST_FOLDERS)):
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}, for its {split} pictures")
        return FolderPictures(found[0] if found else path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    try:
        with np.load(path, allow_pickle=False) as file:
            prefix = f"{split}_" if any(name.startswith(("train_", "test_")) for name in file) else ""
            found = {
                name: file[prefix + name] for name in ("images", "jpeg", "offsets", "labels") if prefix + name in file
            }
            classes = [str(name) for name in file["classes"]] if "classes" in file else None
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} can't be read as an npz file: {error}") from error
    if "labels" not in found or not ("images" in found or {"jpeg", "offsets"} <= found.keys()):
        raise ValueError(f"{path} needs {prefix}labels and {prefix}images, or {prefix}jpeg and {prefix}offsets")
    pixels = found["images"] if "images" in found else found["jpeg"]
    where = f"{path.name}, {split}" if prefix else path.name
    return ArrayPictures(pixels, found["labels"], classes, where, None if "images" in found else found["offsets"])


def count_classes(train: Pictures | None, test: Pictures) -> int:
    """Number of classes.

    Raises:
        ValueError: If those of the test pictures are not those of the training pictures.
    """
    first = test if train is None else train
    if first.classes is not None and test.classes is not None and first.classes != test.classes:
        differ = sorted(set(first.classes) ^ set(test.classes))
        raise ValueError(
            f"training and test pictures differ in their classes, or in the order: {', '.join(differ[:5])}"
        )
    count = len(first.classes) if first.classes is not None else int(first.labels.max()) + 1
    if test.labels.max() >= count:
        raise ValueError(f"test pictures have labels up to {test.labels.max()}, there are {count} classes in training")
    return count


def checksum(*arrays: np.ndarray) -> str:
    """Changes with the shapes and values of arrays."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), zlib.crc32(str(array.shape).encode(), total))
    return f"{total:08x}"
