"""Pictures with masks, in the layouts of a plain folder, of Cityscapes and of ACDC."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IGNORED = 255  # pixels of a mask that belong to no class
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# What is trained and tested on Cityscapes and ACDC: the number of a class in labelIds masks, by its trainId.
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
_TRAIN_IDS = np.full(256, IGNORED, np.uint8)
_TRAIN_IDS[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))


@dataclass(frozen=True)
class Pair:
    """A picture and its mask.

    Attributes:
        image: File of the picture.
        mask: File of the mask, one channel of class numbers.
        is_label_ids: Whether these are labelIds of Cityscapes instead of the numbers of classes.
        group: What is also summarised by itself, such as a weather condition; "" for nothing.
    """

    image: Path
    mask: Path
    is_label_ids: bool = False
    group: str = ""

    def read_mask(self) -> np.ndarray:
        """Class numbers, (H, W) uint8, 255 for pixels to leave out.

        Raises:
            OSError, ValueError: If it can't be decoded, or isn't one channel of bytes.
        """
        with Image.open(self.mask) as opened:
            if opened.mode not in ("L", "P"):
                raise ValueError(f"a mask has one channel of bytes with class numbers, this one is {opened.mode}")
            values = np.array(opened)
        return _TRAIN_IDS[values] if self.is_label_ids else values


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder, and the names of the classes if the layout has its own."""

    layout: str
    pairs: list[Pair]
    classes: list[str] | None

    def fingerprint(self, root: Path) -> str:
        """Changes with names and sizes of the files."""
        files = [file for pair in self.pairs for file in (pair.image, pair.mask)]
        listing = "\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in files)
        return f"{zlib.crc32(listing.encode()):08x}"


def find_pairs(root: Path, layout: str = "auto", split: str = "val") -> Pairs:
    """Find the pictures with their masks.

    Args:
        root: The folder: "folder" has images/ and masks/ with files of the same names, endings apart; "cityscapes"
            leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/ with *_labelTrainIds.png or *_labelIds.png; "acdc"
            rgb_anon/CONDITION/SPLIT/SEQUENCE/*_rgb_anon.png and gt/ with *_gt_labelTrainIds.png or *_gt_labelIds.png.
        layout: One of these, or "auto" for what is there.
        split: Of Cityscapes and ACDC.

    Raises:
        FileNotFoundError: If there are no pictures, or one has no mask.
        ValueError: If there is no such layout.
    """
    if layout == "auto":
        marks = {"cityscapes": "leftImg8bit", "acdc": "rgb_anon", "folder": "images"}
        layout = next((name for name, mark in marks.items() if (root / mark).is_dir()), "")
        if not layout:
            raise FileNotFoundError(f"{root} has none of the folders {', '.join(marks.values())}")
    finders = {"folder": _folder, "cityscapes": _cityscapes, "acdc": _acdc}
    if layout not in finders:
        raise ValueError(f"there is no layout {layout!r}; there are auto, {', '.join(finders)}")
    pairs = finders[layout](root, split)
    if not pairs:
        raise FileNotFoundError(f"{root} has no pictures in the layout {layout}, split {split}")
    return Pairs(layout, pairs, None if layout == "folder" else list(CITYSCAPES))


def _folder(root: Path, split: str) -> list[Pair]:
    images, masks = (_by_stem(root / name) for name in ("images", "masks"))
    if lonely := sorted(images.keys() ^ masks.keys()):
        where = "images" if lonely[0] in images else "masks"
        raise FileNotFoundError(
            f"{len(lonely)} files in {root} have no partner of the same name, such as {where}/{lonely[0]}; every "
            "picture in images/ needs its mask in masks/"
        )
    return [Pair(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    """Pictures below a folder by their path in it without the ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; the layout folder has images/ and masks/")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in found:
                raise ValueError(f"{found[stem]} and {path} differ in their endings alone; which of them is meant?")
            found[stem] = path
    return found


def _cityscapes(root: Path, split: str) -> list[Pair]:
    end = "_leftImg8bit.png"
    images = sorted((root / "leftImg8bit" / split).glob(f"*/*{end}"))
    masks = [root / "gtFine" / split / image.parent.name / image.name.replace(end, "_gtFine") for image in images]
    return list(map(_labelled, images, masks))


def _acdc(root: Path, split: str) -> list[Pair]:
    end, top = "_rgb_anon.png", root / "rgb_anon"
    images = sorted(top.glob(f"*/{split}/*/*{end}"))
    masks = [root / "gt" / image.parent.relative_to(top) / image.name.replace(end, "_gt") for image in images]
    return [_labelled(image, mask, image.parts[-4]) for image, mask in zip(images, masks, strict=True)]


def _labelled(image: Path, stem: Path, group: str = "") -> Pair:
    for end in ("_labelTrainIds.png", "_labelIds.png"):
        mask = stem.with_name(stem.name + end)
        if mask.is_file():
            return Pair(image, mask, end == "_labelIds.png", group)
    raise FileNotFoundError(f"{image} has no mask {stem}_labelTrainIds.png or {stem.name}_labelIds.png")
