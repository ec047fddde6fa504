"""Reads the vision tower while it encodes pictures: attention, keys and features.

An attention module runs once more, as a copy whose attention function looks at what it is given.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltok.engine.attention import cls_attention, received_attention
from vltok.engine.instead import Instead
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.visual import AttentionKind, AttentionRequest

READ_TOWER = "vltok_read_tower"


def tower_attention(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], kind: AttentionKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a tower's tokens, and their keys, from the queries and keys that the module attends with.

    Norms, rotary positions, windows, adapters and masks are the module's own: it runs as a copy, whose attention
    function looks at what it is given and returns zeros.

    Args:
        module: An attention module, about to run.
        args: Its arguments.
        kwargs: Its keyword arguments.
        kind: "cls" for the first query's row, "received" for what all queries give together.

    Returns:
        Attention, (R, S), float32, in the order in which the tower has its tokens, 0 for padding; and keys,
        (R, S, H, d). Where pictures stand one after another in one row, R is 1.

    Raises:
        UnsupportedModelError: If the module doesn't attend by one of transformers' attention functions, or timm's.
    """
    if READ_TOWER not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(READ_TOWER, _read_tower)
    shadow = copy.copy(module)
    shadow.training = False
    shadow.vltok_reading = kind, (parts := []), (keys := [])
    if hasattr(module, "fused_attn"):
        shadow.fused_attn = True
        with _FusedReading(shadow):
            type(module).forward(shadow, *args, **kwargs)
    else:
        shadow.config = Instead(module.config, _attn_implementation=READ_TOWER)
        type(module).forward(shadow, *args, **kwargs)
    if not parts:
        raise unreadable_tower(module)
    return torch.cat(parts, dim=-1), torch.cat(keys, dim=2).transpose(1, 2)


def can_be_read(module: nn.Module | None) -> bool:
    """Whether an attention module looks like one of transformers, which names its function, or one of timm."""
    return hasattr(module, "fused_attn") or hasattr(getattr(module, "config", None), "_attn_implementation")


class _FusedReading(TorchFunctionMode):
    """Reads what a module of timm hands to torch's fused attention."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        output, _ = _read_tower(self.module, *args[:3], kwargs.get("attn_mask"), scaling=kwargs.get("scale"))
        return output.transpose(1, 2)


def _read_tower(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    kind, parts, keys = module.vltok_reading
    keys.append(key)
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise UnsupportedInputError(
            f"attention in the vision tower can't be read under a mask of type {type(attention_mask).__name__}; load "
            'the model with attn_implementation="sdpa"'
        )
    if attention_mask is not None and attention_mask.dim() == 2:  # which tokens are no padding
        attention_mask = attention_mask[:, None, None].bool()
    bounds = kwargs.get("cu_seq_lens_q")
    lengths = [query.shape[2]] if bounds is None else bounds.diff().tolist()
    read, scale = (cls_attention if kind == "cls" else received_attention), kwargs.get("scaling")
    with torch.autocast(query.device.type, enabled=False):
        for own_query, own_key in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True):
            parts.append(read(own_query, own_key, scale or query.shape[-1] ** -0.5, attention_mask))
    return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None


def unreadable_tower(module: nn.Module) -> UnsupportedModelError:
    """What to say of a vision tower whose attention can't be read."""
    return UnsupportedModelError(
        f"{type(module).__name__} attends by none of transformers' attention functions, nor timm's, so it can't be "
        "read what patches attend to; choose a method that needs no vision attention, such as DivPrune, or ToDRE with "
        "pivot='center'"
    )


class TowerReader:
    """Stands before the attention of a tower's layer, and reads it for the encoding under way that asked for it."""

    def __init__(self, tape: Any, request: AttentionRequest) -> None:
        self.tape = tape
        self.request = request

    @torch.no_grad()
    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoding = self.tape.encoding  # none while a backward pass recomputes a checkpointed layer
        if encoding is None or encoding.wanted is None or encoding.wanted.attention != self.request:
            return
        attention, keys = tower_attention(module, args, kwargs, self.request.kind)
        encoding.note("attention", attention)
        if encoding.wanted.keys:
            encoding.note("keys", keys)


class FeatureReader:
    """Stands behind a tower's last block, or the projector, and notes the features for the encoding under way.

    Args:
        tape: The engine's.
    """

    def __init__(self, tape: Any) -> None:
        self.tape = tape

    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        self._note("inputs" if states.shape[:-1] == output.shape[:-1] else "features", states)

    def after_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._note("features", output if isinstance(output, torch.Tensor) else output[0])

    def _note(self, name: str, states: torch.Tensor) -> None:
        encoding = self.tape.encoding  # none while a backward pass recomputes a checkpointed layer
        if encoding is not None and encoding.wanted is not None and encoding.wanted.features:
            states = states if encoding.wanted.merges else states.detach()
            encoding.note(name, states.unsqueeze(0) if states.dim() == 2 else states.flatten(1, -2))
