"""From the options that name data to the parts of a bench."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eval.image_classification.sources import FolderSource, Source
from eval.robustness.accuracy import Accuracy
from eval.robustness.corruptions import SEVERITIES, corruption_cells
from eval.robustness.flips import Flips
from eval.robustness.setup import ClassifierSetup


def plan_parts(
    setup: ClassifierSetup,
    clean: Source | None,
    corruptions: Sequence[str],
    severities: Sequence[int] = SEVERITIES,
    *,
    imagenet_c: Path | None = None,
    subsets: Sequence[str] = (),
    imagenet_p: Path | None = None,
) -> list[Accuracy | Flips]:
    """Make the parts.

    Args:
        setup: Of the bench.
        clean: Clean pictures, from which corrupted ones are made where no folder has them.
        corruptions: Names of the corruptions.
        severities: Of each.
        imagenet_c: Folder of corrupted pictures, CORRUPTION/SEVERITY/CLASS/FILE, or these in folders of their own, such
            as noise/.
        subsets: "NAME=FOLDER" with a subfolder for some of the classes each.
        imagenet_p: Folder of sequences.

    Raises:
        OSError: If a folder is not there.
        ValueError: If there is nothing to do, or a name is written otherwise or comes twice.
    """
    made = corruption_cells(corruptions, severities)
    parts: list[Accuracy | Flips] = []
    if clean is not None:
        cells = {"clean": (None, 0)} | ({} if imagenet_c else made)
        height, width = setup.classifiers.preprocess.input_size[1:]
        is_cropped = not clean.fits(height, width)  # as eval.image_classification decides
        parts.append(Accuracy("--data", lambda: clean, cells, setup, is_cropped=is_cropped))
    if imagenet_c is not None:
        for cell, (name, severity) in made.items():
            folder = _corruption_folder(imagenet_c, name) / str(severity)
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}; leave it out with --corruptions or --severities")
            parts.append(Accuracy(str(folder), partial(FolderSource, folder), {cell: (None, 0)}, setup))
    names: set[str] = set()
    for text in subsets:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in names:
            raise ValueError(f"--subset is written NAME=FOLDER, every name once, got {text!r}")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {folder}, of the subset {name}")
        names.add(name)
        cells = {f"subset/{name}": (None, 0)}
        parts.append(Accuracy(name, partial(FolderSource, Path(folder)), cells, setup, is_subset=True))
    if imagenet_p is not None:
        parts.append(Flips(imagenet_p, setup))
    if not parts:
        raise ValueError("there is nothing to test on: give --data, --imagenet-c, --subset or --imagenet-p")
    return parts


def _corruption_folder(root: Path, name: str) -> Path:
    """ROOT/NAME, or ROOT/GROUP/NAME as the published archives have it when each is unpacked in a folder of its own."""
    if (root / name).is_dir():
        return root / name
    found = sorted(root.glob(f"*/{name}"))
    if not found:
        raise FileNotFoundError(
            f"{root} has no folder {name}; ImageNet-C is kept as CORRUPTION/SEVERITY/CLASS/FILE. --corruptions says "
            "which to take"
        )
    return found[0]
