"""What is on disk of a comparison: a record and the weights of every finished run, so that a later call goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from eval.image_classification.arms import Arm


class Records:
    """The runs in a folder: NAME-seedN.json and NAME-seedN.safetensors, both or none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def weights(self, arm: Arm, seed: int) -> Path:
        """Where the trained weights of a run are or will be, those of its methods among them."""
        return self.folder / f"{arm.name}-seed{seed}.safetensors"

    def read(self, arm: Arm, seed: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the record of a run, None where it isn't finished.

        Raises:
            ValueError: If it was made with other settings, naming those.
        """
        path = self._path(arm, seed)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if differ := differences(record["settings"], settings):
            raise ValueError(
                f"{path} is of a run with other settings: {'; '.join(differ)}. Choose another --out, or go on with the "
                "settings it has"
            )
        return record

    def write(self, arm: Arm, seed: int, record: Mapping[str, Any], model: nn.Module) -> None:
        """Write a finished run, the weights first; a crash while writing leaves no record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
        weights = self.weights(arm, seed)
        notes = {"arm": json.dumps(arm.to_dict()), "seed": str(seed), "model": json.dumps(record["settings"]["model"])}
        save_file(state, weights.with_suffix(".new"), metadata=notes)
        os.replace(weights.with_suffix(".new"), weights)
        write_json(self._path(arm, seed), record)

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.folder / f"{arm.name}-seed{seed}.json"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run was made with, which doesn't decide what it is."""
    import timm

    import vltok

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vltok": vltok.__version__,
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between settings that were read from a JSON file and others, as sentences without a full stop."""
    before, now = _flat(found), _flat(json.loads(json.dumps(wanted)))
    return [
        f"{name} was {before.get(name, 'not set')!r}, is {now.get(name, 'not set')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict: {"recipe": {"lr": 1}} becomes {"recipe.lr": 1}."""
    if not isinstance(settings, dict | list) or not settings:
        return {prefix: settings}
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
