"""Which condenser a server puts in the place of a model's projector. Knows no server.

The field `vltok_condenser` of the model's config names the folder that `vltok.save` wrote beside the model. Its
settings are plain JSON, its weights are safetensors, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vltok.errors import CheckpointError, UnsupportedModelError
from vltok.files import copy_weights, read_json, read_weights
from vltok.methods.condensing.condenser import Condenser
from vltok.serialization import CONFIG_FILE, WEIGHTS_FILE, read_methods
from vltok.serving.options import CONDENSER, FIELD, SAVED

FAMILY = "llava"  # whose condensers are served
PROJECTOR = "multi_modal_projector"


@dataclass(frozen=True)
class SavedCondenser:
    """A condenser in a folder.

    Attributes:
        folder: The folder.
        method: The method, with one scale factor.
    """

    folder: Path
    method: Condenser

    @staticmethod
    def of_folder(folder: str | Path) -> SavedCondenser:
        """Read what `vltok.save` wrote.

        Raises:
            CheckpointError: If something is missing or damaged.
            UnsupportedModelError: If it can't be served.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; give a folder that vltok.save() wrote of a condenser")
        place = folder / CONFIG_FILE
        content = read_json(place)
        methods = read_methods(content, str(place))
        names = ", ".join(str(method.name) for method in methods)
        if len(methods) > 1 or not isinstance(methods[0], Condenser):
            raise UnsupportedModelError(
                f"{place} holds {names}, and a server takes one condenser alone; save that one alone, or run all of it "
                "with vltok.load"
            )
        if content["family"] != FAMILY:
            raise UnsupportedModelError(
                f"{place} was saved from a {content['family']!r} model, and condensers are served on {FAMILY!r} alone; "
                "run it with vltok.load"
            )
        (method,) = methods
        if len(method.scales) > 1:
            raise UnsupportedModelError(
                f"{place} has the scale factors {method.scales}, and a server has one; copy the folder and leave "
                "one of them in its scale_factor: the weights fit each"
            )
        return SavedCondenser(folder, method)

    @staticmethod
    def of_config(config: Any) -> SavedCondenser:
        """Read what a model's config names.

        Raises:
            CheckpointError: As `of_folder`; or if the config names none, or was saved with a method on the model.
            UnsupportedModelError: As `of_folder`; or if the model is to be pruned, too.
        """
        folder = getattr(config, CONDENSER, None)
        if not isinstance(folder, str):
            raise CheckpointError(f"{CONDENSER} must name a folder that vltok.save() wrote, got {folder!r}")
        if getattr(config, SAVED, None) is not None:
            raise CheckpointError(
                f"this checkpoint was saved with a vltok method on the model (field {SAVED!r} of its config); serve "
                f"the model that it was made from, and name in {CONDENSER} what vltok.save() writes of the handle"
            )
        if getattr(config, FIELD, None) is not None:
            raise UnsupportedModelError(
                f"{CONDENSER} and {FIELD} exclude each other: condensed tokens aren't pruned in a server; leave one out"
            )
        return SavedCondenser.of_folder(folder)

    @property
    def fewer(self) -> int:
        """How many times fewer tokens there are, s^2."""
        return self.method.scales[0] ** 2

    def identity(self) -> str:
        """What tells images apart that were condensed in different ways: a hash of settings and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def load(self, projector: nn.Module) -> set[str]:
        """Give a projector the saved weights, and return their names in the model.

        Raises:
            CheckpointError: If they are damaged or don't fit.
        """
        file = self.folder / WEIGHTS_FILE
        expected = {f"{PROJECTOR}.{name}": tensor for name, tensor in projector.state_dict().items()}
        copy_weights(expected, read_weights([file]), file)
        return {*expected}
