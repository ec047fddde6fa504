"""Which output of a model a folder of pictures means: by name, as of an ImageNet folder's wnids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from eval.image_classification.sources import Source


class Relabelled(Source):
    """The pictures of a source with other labels."""

    def __init__(self, source: Source, labels: np.ndarray, classes: list[str]) -> None:
        self.source, self.labels, self.classes = source, labels, classes
        self.fingerprint = source.fingerprint

    def open(self, index: int):
        return self.source.open(index)

    def name(self, index: int) -> str:
        return self.source.name(index)


def read_classes(path: Path) -> list[str]:
    """Read the names of a model's classes in the order of its outputs.

    Args:
        path: A text file with one name in each line (what follows a space is ignored), or a folder whose subfolders,
            sorted, are the classes, such as ImageNet's val/.

    Raises:
        OSError: If there is neither.
        ValueError: If there are no classes in it, or a name comes twice.
    """
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.is_dir())
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} names no classes; give a file with one name per line, or a folder with one per class")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} names the class {twice!r} more than once")
    return names


def output_names(num_outputs: int, given: Sequence[str] | None, of_data: Sequence[str] | None) -> list[str] | None:
    """Names of a model's outputs.

    Args:
        num_outputs: How many it has.
        given: What the user said they are.
        of_data: Classes of the clean pictures, taken where there are as many.

    Returns:
        The names; for 1000 outputs that nobody names ImageNet's wnids; None where nothing is known.

    Raises:
        ValueError: If the user named another number of classes.
    """
    if given is not None and len(given) != num_outputs:
        raise ValueError(f"--classes names {len(given)} classes, the model has {num_outputs} outputs")
    if given is not None:
        return list(given)
    if of_data is not None and len(of_data) == num_outputs:
        return list(of_data)
    return ImageNetInfo("imagenet-1k").label_names() if num_outputs == 1000 else None


def match_outputs(source: Source, names: Sequence[str] | None, num_outputs: int, where: str) -> Source:
    """Turn the labels of a source into numbers of outputs, by the names of its classes.

    Pictures without names of classes, such as those of an npz file without `classes`, are labelled by output already.

    Raises:
        ValueError: If a class is no output of the model.
    """
    if source.classes is None:
        if source.labels.max() >= num_outputs:
            raise ValueError(f"{where} has labels up to {source.labels.max()}, the model {num_outputs} outputs")
        return source
    if names is None:
        if len(source.classes) == num_outputs:
            return source
        raise ValueError(
            f"{where} has {len(source.classes)} classes, the model {num_outputs} outputs, and nothing says which is "
            "which: name the classes of the outputs with --classes, a file or the folder of all classes"
        )
    number = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in source.classes if name not in number]:
        raise ValueError(
            f"{where} has {len(unknown)} classes that are none of the model's {len(names)}: {', '.join(unknown[:3])}; "
            f"those are named {', '.join(names[:3])}, ...; --classes says otherwise"
        )
    lookup = np.array([number[name] for name in source.classes], np.int64)
    return Relabelled(source, lookup[source.labels], list(names))
