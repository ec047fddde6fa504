"""Converters: checkpoints of other programs become folders that transformers and vltok load.

    python -m vltok.convert tokenpacker OFFICIAL_DIR OUT

One file per kind of checkpoint. Here is what they share: reading and writing weights file by file, so that a model much
larger than the memory passes through, and folders that appear whole or not at all.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vltok.errors import CheckpointError

LISTED_NAMES = 20  # of each kind in an error; a checkpoint of another program can differ in thousands


@dataclass(frozen=True)
class Shard:
    """An open file of weights.

    Attributes:
        shapes: The shape of each tensor.
        read: Gets a tensor by its name; valid while the file is open.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """Where a tensor is found.

    Attributes:
        file: The file.
        name: Its name there.
        shape: Its shape.
    """

    file: Path
    name: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: If it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Find the files of a model's weights: those its index names, else all of the usual names; safetensors first.

    Raises:
        CheckpointError: If an index names a file that isn't there.
    """
    for index, pattern in (
        ("model.safetensors.index.json", "model*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if not (folder / index).is_file():
            if files := sorted(folder.glob(pattern)):
                return files
            continue
        names = read_json(folder / index).get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(f"{folder / index} has no weight_map")
        files = sorted({folder / Path(str(name)).name for name in names.values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder / index} names files that are not there: {', '.join(missing)}")
        return files
    return []


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Open a .safetensors file, or a .bin file of torch.save, without reading it into memory.

    Raises:
        CheckpointError: If it is damaged, or holds anything but tensors. Pickled code is never run.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                yield Shard(shapes, file.get_tensor)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        return
    tensors = _load(path)
    try:
        yield Shard({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)
    finally:
        tensors.clear()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} was refused: it is no file of weights that torch.save has written since version 1.6, or it holds "
            f"pickled code: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} must hold one tensor per name, as a model's state_dict() does")
    return dict(tensors)


def scan(
    files: Sequence[Path], renames: Sequence[tuple[re.Pattern[str], str | None]]
) -> tuple[dict[str, Entry], list[str]]:
    """Look up all tensors of some files under new names, without reading them.

    Args:
        files: Files that `open_shard` opens.
        renames: The first pattern that matches a whole name makes the new one; None leaves the tensor out.

    Returns:
        Where the tensor of each new name is, and the names that no pattern matched.

    Raises:
        CheckpointError: If two tensors get the same name.
    """
    found: dict[str, Entry] = {}
    unknown: list[str] = []
    for file in files:
        with open_shard(file) as shard:
            for name, shape in shard.shapes.items():
                match, template = next(
                    ((match, new) for pattern, new in renames if (match := pattern.fullmatch(name))), (None, None)
                )
                if match is None:
                    unknown.append(name)
                elif template is not None:
                    new = match.expand(template)
                    if new in found:
                        twin = found[new]
                        raise CheckpointError(
                            f"{name} in {file} and {twin.name} in {twin.file} are the same weight; remove one of them"
                        )
                    found[new] = Entry(file, name, shape)
    return found, unknown


def check_names(
    place: Path, found: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], unknown: Sequence[str]
) -> None:
    """Raise CheckpointError unless just the expected tensors were found; the message lists all that differ.

    Args:
        place: The checkpoint, for the message.
        found: Where the tensor of each new name is.
        expected: Shape of each tensor by its new name.
        unknown: Names that got no new one.
    """
    strangers = [*unknown, *(found[name].name for name in found.keys() - expected.keys())]
    shapes = [
        f"{found[name].name} has shape {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:LISTED_NAMES])}"
        + (f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else "")
        for kind, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(strangers)),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights in {place} don't fit; {'; '.join(problems)}")


class ShardWriter:
    """Writes model-00001-of-0000N.safetensors files of bounded size and their index.

    Args:
        folder: Where to.
        max_bytes: Size of a file; only a tensor that is larger by itself makes a larger one.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes, self.total_bytes = folder, max_bytes, 0
        self._files: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into the current file; a new one is begun if it doesn't fit any more."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self.flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def flush(self) -> None:
        """End the current file and let go of its tensors."""
        if not self._pending:
            return
        save_file(self._pending, self._path(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> int:
        """End the last file, give all their final names, and write the index. Returns the number of files."""
        self.flush()
        count = len(self._files)
        weight_map = {}
        for number, names in enumerate(self._files):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return count

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number + 1:05}.safetensors"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the name `target` at the end of the block, or vanishes if the block raises.

    Raises:
        FileExistsError: If `target` is there and is anything but an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and not empty; give a new folder or remove it first")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        folder.replace(target)
