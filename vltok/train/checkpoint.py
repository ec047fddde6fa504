"""What a training run leaves on disk: the methods in vltok's format, and the rest of what was trained beside them.

folder/adapter   vltok_config.json and vltok.safetensors: the methods and the weights they added (`vltok.load`)
folder/model     if more than that was trained: the whole model as transformers saves it, or its LoRA as PEFT does
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from vltok.api import Handle
from vltok.errors import CheckpointError
from vltok.files import check_weights, copy_weights, read_weights
from vltok.serialization import WEIGHTS_FILE, added_state_dict, write_folder

ADAPTER, MODEL = "adapter", "model"


def is_lora(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config")


class TrainedWeights:
    """Writes and reads what trains in a model, by names that stay the same however the model is wrapped later.

    Args:
        handle: The methods on the model.
        model: The model that trains: the handle's, or a PEFT model around it.
    """

    def __init__(self, handle: Handle, model: nn.Module) -> None:
        self.handle, self.model = handle, model
        host = next(name for name, module in model.named_modules() if module is handle.host)
        self.added = {name: f"{host}.{name}" if host else name for name in added_state_dict(handle)}
        added = {id(parameter) for module in handle.added_modules for parameter in module.parameters()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in added]
        self.only_added = not any(parameter.requires_grad for parameter in others)

    def save(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write them.

        Args:
            folder: Where to.
            state_dict: The model's whole state, where shards were gathered; by default read from the model.
        """
        state = self.model.state_dict() if state_dict is None else state_dict
        folder = Path(folder)
        (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
        write_folder(
            folder / ADAPTER,
            self.handle.settings(),
            {name: state[full].detach().cpu() for name, full in self.added.items()},
        )
        if self.only_added:
            return
        if is_lora(self.model):  # PEFT would ask the hub about the base model before it left embeddings out
            self.model.save_pretrained(folder / MODEL, state_dict=dict(state), save_embedding_layers=False)
            return
        self.handle.model.save_pretrained(folder / MODEL, state_dict=dict(state), save_original_format=False)
        if self.handle.processor is not None:
            self.handle.processor.save_pretrained(folder / MODEL)

    def load(self, folder: str | Path) -> None:
        """Read them back into the model, all or none.

        Raises:
            CheckpointError: If the folder doesn't hold the weights of this model, or not those that train now.
        """
        folder = Path(folder)
        state = self.model.state_dict()
        added = {name: state[full] for name, full in self.added.items()}
        found = read_weights([folder / ADAPTER / WEIGHTS_FILE]) if added else {}
        check_weights(added, found, folder / ADAPTER)
        if (folder / MODEL).is_dir() == self.only_added:
            raise CheckpointError(
                f"{folder} was written when {'more than' if self.only_added else 'nothing but'} what the methods added "
                "was trained; resume with the same parts to train"
            )
        if not self.only_added:
            others = read_weights(sorted((folder / MODEL).glob("*.safetensors")))
            copy_weights(self._beside_added(state, others), others, folder / MODEL)
        copy_weights(added, found, folder / ADAPTER)

    def _beside_added(
        self, state: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights of the model that its own file must hold, given what it does hold."""
        if is_lora(self.model):
            from peft import get_peft_model_state_dict

            return get_peft_model_state_dict(self.model, save_embedding_layers=False)
        held = {state[name].data_ptr() for name in found if name in state}  # files hold tied weights once
        return {name: tensor for name, tensor in state.items() if name in found or tensor.data_ptr() not in held}
