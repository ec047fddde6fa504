"""save() and load(): the methods on a model as a small folder, settings as JSON and added weights as safetensors.

from_pretrained() loads a whole model that transformers saved while methods with weights of their own were on it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from vltok.api import Handle, apply
from vltok.checks import check_finite, fits, is_integer
from vltok.engine.guard import CONFIG_FIELD, marked_configs, read_note, restore_fields
from vltok.engine.parts import live
from vltok.errors import CheckpointError, VltokError
from vltok.files import check_kinds, check_settings, copy_weights, read_json, read_weights, weight_files
from vltok.method import Method

CONFIG_FILE = "vltok_config.json"
WEIGHTS_FILE = "vltok.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_FIELDS = {"vltok_version", "family", "methods"}
_IDS = ("image_token_id", "video_token_id")  # fields beside them where the family is "generic"


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


def load(
    model: nn.Module, folder: str | Path, *, processor: Any = None, text_tower: tuple[nn.Module, Any] | None = None
) -> Handle:
    """Apply the methods saved in a folder to a model, with their weights.

    Args:
        model: A model of the family they were saved from.
        folder: What `save` wrote.
        processor: The model's processor, where a method needs it.
        text_tower: A CLIP model and its tokenizer, where a method needs them, as for `apply`; a folder has none.

    Returns:
        The handle, as from `apply`.

    Raises:
        FileNotFoundError: If the folder has no vltok_config.json.
        CheckpointError: If a file is damaged, names an unknown method or field, another family or settings that are out
            of range or don't fit this model, or if the weights don't fit.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; give a folder written by vltok.save()")
    weights = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    return _apply_saved(model, read_json(path), processor, text_tower, str(path), weights)


def from_pretrained(
    folder: str | Path, *, processor: Any = None, text_tower: tuple[nn.Module, Any] | None = None, **options: Any
) -> Handle:
    """Load a model that `save_pretrained` wrote while methods with weights of their own were on it.

    Such a checkpoint says in its config what was on the model, and transformers refuses to load it without that.

    Args:
        folder: What `handle.model.save_pretrained` wrote, a local folder.
        processor: The model's processor; by default the one saved in the folder, if there is one.
        text_tower: As for `load`.
        options: For the model's own `from_pretrained`, such as dtype or device_map.

    Returns:
        The handle; the model is `handle.model`, its processor `handle.processor`.

    Raises:
        FileNotFoundError: If there is no such folder.
        CheckpointError: If the checkpoint was not saved with vltok methods on it, is damaged, or doesn't fit this
            version.
    """
    import transformers

    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json; give a folder written by the model's save_pretrained()")
    read_json(path)  # transformers has no words for a damaged file
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    marked = next(marked_configs(config), None)
    if marked is None:
        raise CheckpointError(
            f"{folder} was saved without vltok methods that have weights on it; load it with transformers, and "
            "methods with vltok.apply() or vltok.load()"
        )
    place = f"{path} (field {CONFIG_FIELD!r})"
    check_settings(getattr(marked, CONFIG_FIELD), place)
    settings, before = read_note(marked, place)
    read_methods(settings, place)
    delattr(marked, CONFIG_FIELD)
    restore_fields(marked, before.get("config", {}), place)
    if hasattr(marked, "vision_config"):
        restore_fields(marked.vision_config, before.get("vision_config", {}), place)
    if processor is None and any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        restore_fields(processor, before.get("processor", {}), place)
    known = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [each for each in known if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)]
    model_class = known[0] if known else transformers.AutoModelForImageTextToText
    files, own = weight_files(folder) or sorted(folder.glob("*.safetensors")), folder / WEIGHTS_FILE
    if getattr(config, "quantization_config", None) is None:
        check_kinds(files)
    try:
        with _silence():  # it would list the new weights as strangers, and miss the old ones
            model = model_class.from_pretrained(folder, config=config, local_files_only=True, **options)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no model that transformers can build: {error!r}") from error
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, folder)
    return _apply_saved(model, settings, processor, text_tower, place, [own] if own.exists() else files)


def _apply_saved(
    model: nn.Module, content: Any, processor: Any, text_tower: Any, place: str, files: list[Path]
) -> Handle:
    """Apply the methods that `content` describes, as it was found at `place`, and give them their weights."""
    methods = read_methods(content, place)
    generic = {"family": "generic", **{name: content[name] for name in _IDS if name in content}}
    try:
        family = generic if content["family"] == "generic" else {}
        handle = apply(model, methods, processor=processor, text_tower=text_tower, **family)
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, VltokError | torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{place} describes methods that this model can't take: {error}") from error
    try:
        if handle.family != content["family"]:
            raise CheckpointError(
                f"{place} was saved from a {content['family']!r} model, this is a {handle.family!r} model"
            )
        _load_weights(handle, files)
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


def added_state_dict(handle: Handle) -> dict[str, torch.Tensor]:
    """Weights the handle's methods brought into the model, by their names in `handle.host`."""
    return {name: tensor.detach() for name, tensor in _added_tensors(handle)}


def _added_tensors(handle: Handle) -> Iterator[tuple[str, torch.Tensor]]:
    names = {module: name for name, module in handle.host.named_modules()}
    for module in handle.added_modules:
        name, running = _running(handle.host, names[module])
        for key, tensor in running.state_dict(keep_vars=True).items():
            yield f"{name}.{key}", tensor


def _running(host: nn.Module, name: str) -> tuple[str, nn.Module]:
    """What runs in the place of an added module, and its name, where PEFT keeps several copies (`modules_to_save`)."""
    module, plain, parts = host, [], iter(name.split("."))
    for part in parts:
        if (copy := live(module)) is module:
            plain.append(part)
            module = getattr(module, part)
        else:
            module = copy
            if part == "modules_to_save":
                next(parts)  # the adapter's name
    return ".".join(plain), module


def read_methods(content: Any, place: str) -> list[Method]:
    """Read the methods of a settings file.

    Raises:
        CheckpointError: If a field is missing, unknown, of another type or out of range.
    """
    if not isinstance(content, dict) or (missing := _FIELDS - content.keys()):
        raise CheckpointError(f"{place} lacks {', '.join(sorted(missing if isinstance(content, dict) else _FIELDS))}")
    check_settings(content, place)
    writer, family, methods = content["vltok_version"], content["family"], content["methods"]
    if unknown := content.keys() - _FIELDS - set(_IDS if family == "generic" else ()):
        raise CheckpointError(f"{place} has unknown fields {', '.join(sorted(unknown))} (written by vltok {writer})")
    if not isinstance(writer, str) or not isinstance(family, str):
        raise CheckpointError(f"{place}: vltok_version and family must be words, got {writer!r} and {family!r}")
    for name in _IDS:
        if not is_integer(content.get(name, 0)) or content.get(name, 0) < 0:
            raise CheckpointError(f"{place}: {name} must be an integer of at least 0, got {content[name]!r}")
    if not isinstance(methods, list) or not methods or not all(isinstance(settings, dict) for settings in methods):
        raise CheckpointError(f'{place}: "methods" must be a list of settings, one per method, got {methods!r}')
    found = []
    for settings in methods:
        name, version = settings.get("method"), settings.get("version")
        if not isinstance(name, str) or not (version is None or is_integer(version)):
            raise CheckpointError(f"{place}: a method has a name and a format (1, 2, ...), got {name!r}, {version!r}")
        try:
            found.append(Method.from_dict(settings, writer))
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{place}: {error}") from error
        _check_types(found[-1], place)
    return found


def _check_types(method: Method, place: str) -> None:
    """Raise CheckpointError if a setting is not of the type that its field says; not every method looks."""
    hints = get_type_hints(type(method))
    for field in fields(method):
        value = getattr(method, field.name)
        if not fits(value, hints[field.name]):
            raise CheckpointError(f"{place}: {field.name} of {method.name} must be {field.type}, got {value!r}")


def _load_weights(handle: Handle, files: list[Path]) -> None:
    expected = added_state_dict(handle)
    is_whole = any(path.name != WEIGHTS_FILE for path in files)
    found = read_weights(files, _saved_names(handle) if is_whole else None)
    copy_weights(expected, found, ", ".join(map(str, files)) or "the folder, which has no weights,")


def _saved_names(handle: Handle) -> dict[str, str]:
    """The names that transformers saves a model's added weights by, which are not those of its modules -> our names."""
    whole = {id(tensor): name for name, tensor in handle.model.state_dict(keep_vars=True).items()}
    own = [(name, whole[id(tensor)]) for name, tensor in _added_tensors(handle)]
    numbered = {name: torch.tensor([number]) for number, (_, name) in enumerate(own)}
    with tempfile.TemporaryDirectory() as folder, _silence(bars=True):
        handle.model.save_pretrained(folder, state_dict=numbered)
        saved = read_weights(Path(folder).glob("*.safetensors"))
    return {name: own[int(number)][0] for name, number in saved.items()}
