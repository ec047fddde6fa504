"""Converters: checkpoints of other programs become folders that transformers and vltok load.

    python -m vltok.convert tokenpacker OFFICIAL_DIR OUT

One file per kind of checkpoint. Here is what they share: finding and writing weights file by file, so that a model much
larger than the memory passes through, and folders that appear whole or not at all.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from vltok.checks import weight_faults
from vltok.errors import CheckpointError
from vltok.files import Stored, open_weights


def scan(
    files: Sequence[Path], renames: Sequence[tuple[re.Pattern[str], str | None]]
) -> tuple[dict[str, Stored], list[str]]:
    """Look up all tensors of some files under new names, without reading them.

    Args:
        files: Files that `open_weights` opens.
        renames: The first pattern that matches a whole name makes the new one; None leaves the tensor out.

    Returns:
        Where the tensor of each new name is, and the names that no pattern matched.

    Raises:
        CheckpointError: If two tensors get the same name.
    """
    found: dict[str, Stored] = {}
    unknown: list[str] = []
    for file in files:
        with open_weights(file) as opened:
            for name, stored in opened.stored.items():
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
                    found[new] = stored
    return found, unknown


def check_names(
    place: Path, found: Mapping[str, Stored], expected: Mapping[str, torch.Tensor], unknown: Sequence[str]
) -> None:
    """Raise CheckpointError unless just the expected tensors were found; the message lists all that differ.

    Args:
        place: The checkpoint, for the message.
        found: Where the tensor of each new name is.
        expected: What takes each tensor, by its new name.
        unknown: Names that got no new one.
    """
    if faults := weight_faults(found, expected, unknown, {name: stored.name for name, stored in found.items()}):
        raise CheckpointError(f"the weights in {place} don't fit: {faults}")


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
