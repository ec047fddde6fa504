"""Whether the weights of a part of a model are here, whole and real, so that others can be put beside them."""

from __future__ import annotations

import torch
from torch import nn

from vltok.errors import UnsupportedModelError


def check_at_hand(part: nn.Module, title: str, model: nn.Module | None = None) -> None:
    """Check that a part can be read, and that new weights beside it would be trained and moved as its own are.

    Args:
        part: The part.
        title: What it is, to begin a sentence with.
        model: The whole model, in whatever wraps it.

    Raises:
        UnsupportedModelError: If its weights are offloaded, or sharded over processes.
    """
    if any(parameter.is_meta for parameter in part.parameters()):
        raise UnsupportedModelError(
            f"{title} has weights that are offloaded (on the meta device, their values on disk or in the memory of the "
            "CPU), so no others can be put beside them; load it onto a device, or apply the method before offloading"
        )
    if any(_is_sharded(parameter) for parameter in part.parameters()) or _is_wrapped(model):
        raise UnsupportedModelError(
            f"{title} has weights that are sharded over processes (DTensor of fully_shard, FSDP, ZeRO-3), and weights "
            "that come later would be neither sharded nor kept equal; apply the method before sharding the model"
        )


def place_of(*parts: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first weight of these parts that is no quantised one; the CPU and float32 without any."""
    weights = (weight for part in parts for weight in part.parameters() if weight.is_floating_point())
    first = next(weights, torch.empty(0))
    return first.device, first.dtype


def _is_sharded(parameter: nn.Parameter) -> bool:
    """A DTensor by its class, which to import would load much; ZeRO-3 leaves nothing of a weight but its name."""
    kinds = {base.__name__ for data in (parameter, parameter.data) for base in type(data).__mro__}
    return "DTensor" in kinds or parameter.numel() == 0


def _is_wrapped(model: nn.Module | None) -> bool:
    """Whether the model is in the first edition of FSDP, which shards weights under plain names."""
    modules = () if model is None else model.modules()
    return any(base.__name__ == "FullyShardedDataParallel" for module in modules for base in type(module).__mro__)
