"""What `--model_args` may say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vltok.method import Method

_COUNTS = ("batch_size", "max_new_tokens", "max_num_frames", "min_pixels", "max_pixels", "max_patches")


@dataclass(frozen=True)
class Settings:
    """The arguments of a model, those of lmms-eval among them.

    Attributes:
        pretrained: Folder or hub name of the model and its processor.
        method: A method, or several in order, or text such as "divprune;keep_ratio=0.1"; by default the model stays as
            it is.
        saved: Folder that `vltok.save` wrote, for methods with weights, in the place of `method`.
        revision: Of the hub.
        dtype: Name of a torch dtype; "auto" takes the checkpoint's.
        device: Where the model runs; by default the first GPU, or the CPU where there is none. Several processes of
            accelerate take a device each.
        device_map: As in transformers, such as "auto" to spread one model over several GPUs.
        attn_implementation: As in transformers.
        trust_remote_code: As in transformers.
        batch_size: Prompts that are answered together.
        chat_template: A template, or a file that holds one, in the place of the processor's own.
        system_prompt: What every conversation begins with.
        min_pixels: Least size of an image, for image processors that let it decide how many tokens there are.
        max_pixels: Largest size, likewise.
        max_patches: Most tiles of an image, for image processors that cut it into tiles.
        max_num_frames: Most frames that are taken of a video, at equal distances.
        fps: Frames to take per second of a video, up to `max_num_frames`.
        max_new_tokens: Longest answer to tasks that say nothing of it.
    """

    pretrained: str
    method: Method | str | Iterable[Method] | None = None
    saved: str | None = None
    revision: str = "main"
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    batch_size: int | str = 1
    chat_template: str | None = None
    system_prompt: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_patches: int | None = None
    max_num_frames: int = 32
    fps: float | None = None
    max_new_tokens: int = 1024

    @classmethod
    def read(cls, model: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """Check what was given for a model.

        Raises:
            CheckpointError: If a method, or a setting of it, is unknown.
            TypeError: If the model knows no such argument, or one of them is missing.
            ValueError: If a value is out of range or not understood.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise TypeError(f"{model} takes no argument {', '.join(unknown)}; it takes {', '.join(known)}")
        values = {**defaults, **given}
        if "pretrained" not in values:
            raise TypeError(f"{model} needs a model: give pretrained=FOLDER, or its name on the hub")
        for name in _COUNTS:
            if values.get(name) is not None:
                values[name] = _count(name, values[name])
        if values.get("method") is not None and values.get("saved") is not None:
            raise ValueError(
                f"{model} takes method= or saved=, not both, got {given['method']!r} and {given['saved']!r}"
            )
        if isinstance(values.get("method"), str):
            values["method"] = Method.from_text(values["method"].replace(";", ","))  # "," parts lmms-eval's arguments
        return cls(**values)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
