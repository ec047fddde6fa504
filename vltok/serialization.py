"""save() and load(): the methods on a model as a small folder, settings as JSON and added weights as safetensors.

from_pretrained() loads a whole model that transformers saved while methods with weights of their own were on it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vltok.api import Handle, apply
from vltok.engine.guard import CONFIG_FIELD
from vltok.errors import CheckpointError
from vltok.method import Method

CONFIG_FILE = "vltok_config.json"
WEIGHTS_FILE = "vltok.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_FIELDS = {"vltok_version", "family", "methods"}


def save(handle: Handle, folder: str | Path) -> None:
    """Write the methods of a handle: vltok_config.json, and vltok.safetensors if they brought weights.

    Args:
        handle: What `apply` returned, still attached.
        folder: Where to; made if it is missing.

    Raises:
        ValueError: If the handle was removed.
    """
    if not handle.is_attached:
        raise ValueError("this handle was removed from its model, so there is nothing to save; save before remove()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, handle.settings(), added_state_dict(handle))


def write_folder(folder: Path, settings: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Write vltok_config.json, and vltok.safetensors if there are weights; an older one is removed."""
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    if weights:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)


def load(model: nn.Module, folder: str | Path, *, processor: Any = None) -> Handle:
    """Apply the methods saved in a folder to a model, with their weights.

    Args:
        model: A model of the family they were saved from.
        folder: What `save` wrote.
        processor: The model's processor, where a method needs it.

    Returns:
        The handle, as from `apply`.

    Raises:
        FileNotFoundError: If the folder has no vltok_config.json.
        CheckpointError: If the file names an unknown method or field, another family, or the weights don't fit.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; give a folder written by vltok.save()")
    return _apply_saved(model, _read(path), processor, path, folder / WEIGHTS_FILE)


def from_pretrained(folder: str | Path, *, processor: Any = None, **options: Any) -> Handle:
    """Load a model that `save_pretrained` wrote while methods with weights of their own were on it.

    Such a checkpoint says in its config what was on the model, and transformers refuses to load it without that.

    Args:
        folder: What `handle.model.save_pretrained` wrote, a local folder.
        processor: The model's processor; by default the one saved in the folder, if there is one.
        options: For the model's own `from_pretrained`, such as dtype or device_map.

    Returns:
        The handle; the model is `handle.model`, its processor `handle.processor`.

    Raises:
        FileNotFoundError: If there is no such folder.
        CheckpointError: If the checkpoint was not saved with vltok methods on it, or doesn't fit this version.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a folder written by the model's save_pretrained()")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    marked = next(_marked(config), None)
    record = getattr(marked, CONFIG_FIELD, None)
    if not isinstance(record, dict) or "restore" not in record:
        raise CheckpointError(
            f"{folder} was saved without vltok methods that have weights on it; load it with transformers, and "
            "methods with vltok.apply() or vltok.load()"
        )
    record = dict(record)
    before = record.pop("restore")
    settings = _check(record, f"{folder / 'config.json'}, field {CONFIG_FIELD!r}")
    delattr(marked, CONFIG_FIELD)
    _set_fields(marked, before.get("config", {}))
    _set_fields(getattr(marked, "vision_config", None), before.get("vision_config", {}))
    if processor is None and any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        _set_fields(processor, before.get("processor", {}))
    known = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [each for each in known if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)]
    model_class = known[0] if known else transformers.AutoModelForImageTextToText
    with _silence():  # it would list the new weights as strangers, and miss the old ones
        model = model_class.from_pretrained(folder, config=config, local_files_only=True, **options)
    return _apply_saved(model, settings, processor, folder / "config.json", *_weight_files(folder))


def _marked(config: Any) -> Iterator[Any]:
    """The config, and those nested in it, that say what was on their model."""
    if hasattr(config, CONFIG_FIELD):
        yield config
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            yield from _marked(part)


def _apply_saved(model: nn.Module, config: dict[str, Any], processor: Any, source: Path, *weight_files: Path) -> Handle:
    writer = config["vltok_version"]
    methods = [Method.from_dict(data, writer) for data in config["methods"]]
    handle = apply(model, methods, processor=processor)
    try:
        if handle.family != config["family"]:
            raise CheckpointError(
                f"{source} was saved from a {config['family']} model, this is a {handle.family} model"
            )
        _load_weights(handle, *weight_files)
    except BaseException:
        handle.remove()
        raise
    return handle


@contextlib.contextmanager
def _silence(bars: bool = False) -> Iterator[None]:
    """Let transformers write no warnings, and draw no progress bars if `bars`."""
    from transformers.utils import logging

    verbosity, hides_bars = logging.get_verbosity(), bars and logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if hides_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hides_bars:
            logging.enable_progress_bar()


def _set_fields(target: object, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(target, name, value)


def _weight_files(folder: Path) -> list[Path]:
    """Where a saved model's added weights are: vltok's own file, or else all of transformers' files."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    return sorted(path for path in folder.glob("*.safetensors"))


def added_state_dict(handle: Handle) -> dict[str, torch.Tensor]:
    """Weights the handle's methods brought into the model, by their names in `handle.host`."""
    return {name: tensor.detach() for name, tensor in _added_tensors(handle)}


def _added_tensors(handle: Handle) -> Iterator[tuple[str, torch.Tensor]]:
    names = {module: name for name, module in handle.host.named_modules()}
    for module in handle.added_modules:
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{names[module]}.{key}", tensor


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    return _check(config, str(path))


def _check(config: Any, source: str) -> dict[str, Any]:
    if not isinstance(config, dict) or (missing := _FIELDS - config.keys()):
        raise CheckpointError(f"{source} lacks {', '.join(sorted(missing if isinstance(config, dict) else _FIELDS))}")
    if unknown := config.keys() - _FIELDS:
        raise CheckpointError(
            f"{source} has unknown fields {', '.join(sorted(unknown))} (written by vltok {config['vltok_version']})"
        )
    methods = config["methods"]
    if not isinstance(methods, list) or not all(isinstance(settings, dict) for settings in methods):
        raise CheckpointError(f'{source}: "methods" must be a list of settings, one per method, got {methods!r}')
    return config


def _load_weights(handle: Handle, *files: Path) -> None:
    expected = added_state_dict(handle)
    files = tuple(path for path in files if path.exists())
    if not expected and not files:
        return
    is_whole = any(path.name != WEIGHTS_FILE for path in files)
    names = _saved_names(handle) if is_whole else {name: name for name in expected}
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found |= _read_weights(path, names)
    place = ", ".join(map(str, files)) or "the folder"
    copy_weights(expected, found, place)


@torch.no_grad()
def copy_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], place: str | Path) -> None:
    """Copy what was found at `place` into the tensors that are expected, all or none of them.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    if found.keys() != expected.keys():
        raise CheckpointError(
            f"{place} doesn't fit: missing {sorted(expected.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - expected.keys())}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(found[name].shape)} in {place}, expected {tuple(tensor.shape)}"
            )
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def _saved_names(handle: Handle) -> dict[str, str]:
    """The names that transformers saves a model's added weights by, which are not those of its modules -> our names."""
    whole = {id(tensor): name for name, tensor in handle.model.state_dict(keep_vars=True).items()}
    own = [(name, whole[id(tensor)]) for name, tensor in _added_tensors(handle)]
    numbered = {name: torch.tensor([number]) for number, (_, name) in enumerate(own)}
    with tempfile.TemporaryDirectory() as folder, _silence(bars=True):
        handle.model.save_pretrained(folder, state_dict=numbered)
        return {
            saved: own[int(number)][0]
            for path in Path(folder).glob("*.safetensors")
            for saved, number in _read_weights(path, None).items()
        }


def _read_weights(path: Path, names: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """Weights of a file by the names they are to have; all by their own if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()  # not a dict
            if names is None or path.name == WEIGHTS_FILE:
                return {key: file.get_tensor(key) for key in keys}
            return {names[key]: file.get_tensor(key) for key in keys if key in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
