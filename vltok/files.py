"""Files from outside, read in one way: JSON, weights, and models of the hub that are on this machine already.

Whatever is wrong with a file is a CheckpointError that names it. Pickled code is never run, and nothing is downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vltok.checks import FLOATS, check_finite, weight_faults
from vltok.errors import CheckpointError

_MOST_LEVELS = 50  # of brackets inside each other; configs of transformers have five or six
_INTEGERS = range(-(2**63), 2**64)  # whole numbers that a file of settings may hold: those a seed or a size can be

# By the names in a safetensors header; a kind that isn't here is shown by that name.
_DTYPES: dict[str, Any] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}


# JSON


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: If it can't be read, holds something else, names a field twice, or nests too deeply.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    if any(level > _MOST_LEVELS for _, level in _walk(content)):
        raise CheckpointError(f"{path} nests its values more than {_MOST_LEVELS} levels deep")
    return content


def check_settings(content: Any, place: str) -> None:
    """Check that what came from JSON is plain: finite numbers, and integers of at most 64 bits.

    Raises:
        CheckpointError: If it is not.
    """
    for value, _ in _walk(content):
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{place} holds {value}, which is no setting of anything; numbers must be finite")
        if isinstance(value, int) and value not in _INTEGERS:
            raise CheckpointError(f"{place} holds an integer of {value.bit_length()} bits; at most 64 are allowed")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a field comes twice: {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _walk(content: Any) -> Iterator[tuple[Any, int]]:
    """Every value in a JSON value, with the number of brackets around it; without recursion, however deep it is."""
    rest = [(content, 0)]
    while rest:
        value, level = rest.pop()
        yield value, level
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(item, level + 1) for item in inner]


# Weights


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: The file.
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype; a kind that torch or this package has no use for is given by name.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


@dataclass(frozen=True)
class WeightFile:
    """An open file of weights.

    Attributes:
        stored: Its tensors, by name.
        get: Gets a tensor by its name as it is; valid while the file is open.
    """

    stored: Mapping[str, Stored]
    get: Callable[[str], torch.Tensor]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Get a tensor by its name, in its own dtype or another.

        Raises:
            CheckpointError: If it holds values that are NaN, or infinite in that dtype.
        """
        tensor = self.get(name) if dtype is None else self.get(name).to(dtype)
        check_finite(name, tensor, self.stored[name].file)
        return tensor


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open a .safetensors file, or a .bin file of torch.save, without reading it into memory.

    Raises:
        CheckpointError: If it is damaged, or holds anything but tensors.
    """
    if path.suffix != ".safetensors":
        tensors = _load(path)
        stored = {name: Stored(path, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        try:
            yield WeightFile(stored, tensors.__getitem__)
        finally:
            tensors.clear()
        return

    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        kinds = {name: _DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
        stored = {name: Stored(path, name, tuple(x.get_shape()), kinds[name]) for name, x in slices.items()}
        yield WeightFile(stored, file.get_tensor)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"{path} was refused: it is no file of weights that torch.save has written since version 1.6, or it holds "
            f"pickled code: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} must hold one tensor per name, as a model's state_dict() does")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{name} in {path} is no plain tensor: {tensor.layout} on {tensor.device}")
    return dict(tensors)


def read_weights(files: Iterable[Path], names: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Read weights of one or several files.

    Args:
        files: The files.
        names: The names of those wanted, and what to call them; by default all, by their own names.

    Raises:
        CheckpointError: If a file is damaged or isn't there, a weight comes twice, or one holds NaN or infinite values.
    """
    found: dict[str, torch.Tensor] = {}
    for path in files:
        with open_weights(path) as file:
            for name in file.stored:
                called = name if names is None else names.get(name)
                if called in found:
                    raise CheckpointError(f"{name} in {path} is in another file of the folder too; remove one of them")
                if called is not None:
                    found[called] = file.read(name)
    return found


def check_kinds(files: Iterable[Path]) -> None:
    """Check that the weights of a model, which transformers takes for what they are, are not quantised ones.

    Buffers that count something are 32- or 64-bit integers; a weight or bias never is.

    Raises:
        CheckpointError: If one is of another kind than float64, float32, float16 and bfloat16.
    """
    for path in files:
        with open_weights(path) as file:
            for name, stored in file.stored.items():
                is_weight = name.rpartition(".")[2] in ("weight", "bias")
                if stored.dtype not in (FLOATS if is_weight else (*FLOATS, torch.int64, torch.int32)):
                    raise CheckpointError(
                        f"{name} in {path} is {str(stored.dtype).removeprefix('torch.')}, and no quantization_config "
                        "says how to read it; save the model in float32, float16 or bfloat16"
                    )


def check_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], place: str | Path) -> None:
    """Check that what was found at `place` can be copied into the tensors that are expected.

    Raises:
        CheckpointError: If names, shapes or kinds differ, or a value is out of the range of its tensor's dtype.
    """
    if faults := weight_faults(found, expected):
        raise CheckpointError(f"{place} doesn't fit: {faults}")
    for name, tensor in expected.items():
        check_finite(name, found[name].to(tensor.dtype), place)


@torch.no_grad()
def copy_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], place: str | Path) -> None:
    """Copy what was found at `place` into the tensors that are expected, all or none of them.

    Raises:
        CheckpointError: As for `check_weights`.
    """
    check_weights(expected, found, place)
    for name, tensor in expected.items():
        tensor.copy_(found[name])


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


# Models of the hub


def find_model(name: str | Path, download: bool = False) -> str:
    """Say where a model is, without asking the hub: its folder, also where it was fetched by name before.

    Args:
        name: A folder, or a name on the hub.
        download: Whether it may be fetched; its name is then passed on.

    Raises:
        FileNotFoundError: If it is not here and may not be fetched.
    """
    if download or Path(name).is_dir():
        return str(name)

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(name), "config.json")
    except HFValidationError:
        config = None
    if isinstance(config, str):
        return str(Path(config).parent)
    raise FileNotFoundError(f"there is no folder {name}, and no model of that name was fetched from the hub before")
