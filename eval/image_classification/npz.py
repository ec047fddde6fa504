"""Pictures in npz files, as arrays or as JPEG bytes, for training and test in one file or in two."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.image_classification.sources import Source, checksum


class ArraySource(Source):
    """Pictures as an array (n, H, W) or (n, H, W, C) of uint8; C is 1, 3 or 4."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str] | None, where: str) -> None:
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3, 4))
        ):
            raise ValueError(
                f"{where}: images must be uint8 of shape (n, H, W) or (n, H, W, C) with C = 1, 3 or 4, got "
                f"{images.dtype} {images.shape}"
            )
        self.images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        self.labels, self.classes, self.where = _check_labels(labels, len(images), classes, where), classes, where
        self.fingerprint = checksum(self.images, self.labels)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"picture {index} of {self.where}"


class JpegSource(Source):
    """Encoded pictures one behind the other in one array of bytes; picture i ends where picture i + 1 begins."""

    def __init__(
        self, data: np.ndarray, offsets: np.ndarray, labels: np.ndarray, classes: list[str] | None, where: str
    ) -> None:
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"{where}: jpeg must be uint8 of shape (bytes,), got {data.dtype} {data.shape}")
        is_list = offsets.ndim == 1 and len(offsets) >= 1 and np.issubdtype(offsets.dtype, np.integer)
        offsets = offsets.astype(np.int64) if is_list else offsets
        if not is_list or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{where}: offsets must be n + 1 whole numbers that rise from 0 to {len(data)}, the bytes")
        self.data, self.offsets = data, offsets
        self.labels, self.classes, self.where = _check_labels(labels, len(offsets) - 1, classes, where), classes, where
        self.fingerprint = checksum(data, offsets, self.labels)

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()))

    def name(self, index: int) -> str:
        return f"picture {index} of {self.where}"


def read_npz(path: Path, prefix: str) -> Source:
    """Read the pictures of an npz file whose names start with `prefix`, such as "train_" or "".

    Raises:
        ValueError: If it isn't such a file, or its arrays don't fit each other.
    """
    names = npz_names(path)
    where = f"{path.name}, {prefix.rstrip('_')}" if prefix else path.name
    kinds = {"images": [f"{prefix}images"], "jpeg": [f"{prefix}jpeg", f"{prefix}offsets"]}
    kind = next((kind for kind, keys in kinds.items() if {*keys, f"{prefix}labels"} <= set(names)), None)
    if kind is None:
        raise ValueError(
            f"{path} needs the arrays {prefix}labels and either {prefix}images or {prefix}jpeg and {prefix}offsets; "
            f"it has {', '.join(names)}"
        )
    with np.load(path, allow_pickle=False) as file:
        try:
            arrays = [file[key] for key in kinds[kind]]
            labels = file[f"{prefix}labels"]
            classes = [str(name) for name in file["classes"]] if "classes" in names else None
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
    return (ArraySource if kind == "images" else JpegSource)(*arrays, labels, classes, where)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an npz file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it isn't one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not an npz file; give one, or a folder with a subfolder per class") from error


def _check_labels(labels: np.ndarray, count: int, classes: Sequence[str] | None, where: str) -> np.ndarray:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}: labels must be {count} whole numbers, one per picture, got {labels.dtype} {labels.shape}"
        )
    if count == 0:
        raise ValueError(f"{where} holds no pictures")
    labels = labels.astype(np.int64)
    top = len(classes) if classes is not None else None
    if labels.min() < 0 or (top is not None and labels.max() >= top):
        raise ValueError(
            f"{where}: labels must be in 0..{'' if top is None else top - 1}, got {labels.min()}..{labels.max()}"
        )
    return labels
