"""What `--data` and `--test` name, as a source of pictures to train on and one to test on."""

from dataclasses import dataclass
from pathlib import Path

from eval.image_classification.npz import npz_names, read_npz
from eval.image_classification.sources import FolderSource, Source, hold_out

TEST_FOLDERS = ("val", "validation", "test")


@dataclass(frozen=True)
class Data:
    """Pictures to train on, None where nothing trains, pictures to test on, and how many classes there are."""

    train: Source | None
    test: Source
    num_classes: int


def open_data(data: Path, test: Path | None = None, *, trains: bool = True, holdout: float = 0.0) -> Data:
    """Open the pictures.

    Args:
        data: A folder with train/ and one of val/, validation/ and test/, an npz file with both, or one of training
            pictures. Where nothing trains, a folder of classes or a file of test pictures will do.
        test: A folder of classes, or an npz file, in the place of the test pictures in `data`.
        trains: Whether there is training.
        holdout: Test on this share of the training pictures instead, which is then kept from training; 0 for none.

    Raises:
        OSError: If there are no such pictures.
        ValueError: If they don't fit each other, or it isn't clear which to take.
    """
    if holdout and (test is not None or not trains):
        raise ValueError("a share of the training pictures is held out in the place of test pictures; leave out --test")
    train = _train(data) if trains else None
    if holdout:
        train, held_out = hold_out(train, holdout)
        return Data(train, held_out, _count_classes(train, held_out))
    tested = _named(test, "test_") if test is not None else _test(data, trains)
    return Data(train, tested, _count_classes(train, tested))


def _train(data: Path) -> Source:
    if data.is_dir():
        if not (data / "train").is_dir():
            raise FileNotFoundError(f"{data} has no train/ folder with a subfolder per class; it has {_listing(data)}")
        return FolderSource(data / "train")
    return _named(data, "train_")


def _test(data: Path, trains: bool) -> Source:
    if data.is_dir():
        found = [data / name for name in TEST_FOLDERS if (data / name).is_dir()]
        if len(found) > 1:
            raise ValueError(f"{data} has {', '.join(path.name for path in found)}: say which to test on with --test")
        if found:
            return FolderSource(found[0])
        if trains:
            raise FileNotFoundError(f"{data} has none of {', '.join(TEST_FOLDERS)}: name a folder with --test")
        return FolderSource(data)
    if trains and "test_labels" not in npz_names(data):
        raise ValueError(f"{data} holds no test_labels: name the file of test pictures with --test")
    return _named(data, "test_")


def _named(path: Path, prefix: str) -> Source:
    """A folder of classes, or those arrays of an npz file that have the prefix, or no prefix where none has."""
    if path.is_dir():
        return FolderSource(path)
    has_prefix = any(name.startswith(("train_", "test_")) for name in npz_names(path))
    return read_npz(path, prefix if has_prefix else "")


def _count_classes(train: Source | None, test: Source) -> int:
    """Number of classes; those of test pictures must be those of training pictures."""
    first = test if train is None else train
    if first.classes is not None and test.classes is not None and first.classes != test.classes:
        differ = sorted(set(first.classes) ^ set(test.classes))
        raise ValueError(
            f"training and test pictures have different classes, or another order of them: {len(first.classes)} and "
            f"{len(test.classes)}{', only one has ' + ', '.join(differ[:5]) if differ else ''}"
        )
    count = len(first.classes) if first.classes is not None else int(first.labels.max()) + 1
    if test.labels.max() >= count:
        raise ValueError(
            f"test pictures have labels up to {test.labels.max()}, training pictures only up to {count - 1}"
        )
    return count


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
