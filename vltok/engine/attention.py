"""Every way attention is read: rows and columns of a softmax, and the parts of an attention module."""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltok.engine.names import CACHE
from vltok.engine.parts import attention_scale, num_heads
from vltok.errors import UnsupportedModelError
from vltok.views import AttentionKind, AttentionRequest

# Rows and columns of a softmax attention, exact and without the N x N map


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.float().unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (..., S, C) -> (..., H, S, C / H)


def cls_attention(query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Attention of one query row, a = softmax(scale q K^T), mean over the heads.

    Args:
        query: The projected query row, (B, 1, C).
        key: The projected keys, (B, S, C).
        num_heads: Attention heads, H; C is divisible by it.
        scale: Factor of the logits, usually (C / H) ** -0.5.

    Returns:
        Attention, (B, S), float32; each row sums to 1.
    """
    logits = _heads(query, num_heads) @ _heads(key, num_heads).mT * scale  # (B, H, 1, S)
    return logits.softmax(-1).mean(1).squeeze(1)


def received_attention(
    query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float, chunk: int = 256
) -> torch.Tensor:
    """Attention every key receives, the mean over all queries and heads.

    Args:
        query: Projected queries, (B, S, C).
        key: Projected keys, (B, S, C).
        num_heads: Attention heads, H.
        scale: Factor of the logits.
        chunk: Queries taken at a time; peak memory is B * H * chunk * S floats.

    Returns:
        Attention received, (B, S), float32; each row sums to 1.
    """
    keys = _heads(key, num_heads).mT
    total = key.new_zeros(key.shape[0], key.shape[1], dtype=torch.float32)
    for rows in query.split(chunk, dim=1):
        total += (_heads(rows, num_heads) @ keys * scale).softmax(-1).sum(dim=(1, 2))
    return total / (num_heads * query.shape[1])


def indicator_values(columns: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values that make an attention layer return how much each query attends to groups of keys.

    With the c-th value channel 1 on the keys of group c and 0 elsewhere, the attention output's c-th channel is the
    query's attention mass on that group: exact for any mask, rotary embedding or attention kernel.

    Args:
        columns: Which keys belong to which group, (B, S, G), bool; G <= head_dim.
        num_heads: Key-value heads.
        head_dim: Width of a head.
        dtype: The dtype the layer computes in.

    Returns:
        What to put in the place of the value projection's output, (B, S, num_heads * head_dim).

    Raises:
        ValueError: If there are more groups than value channels.
    """
    batch, length, groups = columns.shape
    if groups > head_dim:
        raise ValueError(f"{groups} groups of keys don't fit into {head_dim} value channels; give at most {head_dim}")
    values = columns.new_zeros(batch, length, num_heads, head_dim, dtype=dtype)
    values[..., :groups] = columns.unsqueeze(2)
    return values.flatten(2)


def attention_mass(output: torch.Tensor, head_dim: int, groups: int) -> torch.Tensor:
    """Read the attention mass out of what attention returned for `indicator_values`.

    Args:
        output: Concatenated head outputs before the output projection, (B, S, H * head_dim).
        head_dim: Width of a head.
        groups: Number of groups, G.

    Returns:
        Share of each query's attention on each group, mean over the query heads, (B, S, G), float32.
    """
    return output.unflatten(-1, (-1, head_dim))[..., :groups].float().mean(2)


# Reading the attention of a decoder layer, by running it once more with other values

READ = "vltok_read"  # the attention implementation that reads; registered with transformers when first needed


class _ReadError(Exception):
    """Ends an attention that was run for its probabilities alone."""


class _Reading:
    """What one run of an attention module is read for.

    Attributes:
        name: The attention implementation it has.
        columns: Which keys belong to which group, (B, E, G), bool.
        mass: Share of each query's attention on each group, mean over the heads, (B, Q, G), float32, once it has run.
    """

    def __init__(self, name: str, columns: torch.Tensor) -> None:
        self.name = name
        self.columns = columns
        self.mass: torch.Tensor | None = None


class _Held:
    """Stands for a KV cache in which the keys of this call are already, and for its layer."""

    def __init__(self, keys: torch.Tensor, layer: Any, index: int) -> None:
        self.keys = keys
        self.layer = layer
        self.layers = {index: self}

    def update_index(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys by which attention in blocks chooses these."""
        return self.layer.idx_keys

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        return self.keys, value[:, :, :1].expand(*self.keys.shape[:3], value.shape[-1])


class _Instead:
    """Stands for an object one attribute of which is another."""

    def __init__(self, base: object, **replaced: object) -> None:
        self._base = base
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _read(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> None:
    reading = kwargs.pop("vltok_reading")
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        reading.name, getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    )
    values = indicator_values(reading.columns.to(value.device), value.shape[1], value.shape[-1], value.dtype)
    values = values.unflatten(-1, value.shape[1::2]).transpose(1, 2)
    output, _ = attend(module, query, key, values, mask, **kwargs)  # (B, Q, H, d)
    reading.mass = attention_mass(output.flatten(2), output.shape[-1], reading.columns.shape[-1])
    raise _ReadError


@torch.no_grad()
def decoder_mass(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], columns: torch.Tensor, past: Any
) -> torch.Tensor:
    """Say how much each query of a decoder layer attends to groups of keys, exactly and without the map.

    The module runs again on what it just ran on, as a copy of its own that other threads don't see, with indicator
    values in the place of its values.

    Args:
        module: The attention of a decoder layer.
        args: Its arguments in the forward that just ran.
        kwargs: Its keyword arguments there.
        columns: The groups of keys, (B, E, G), bool.
        past: The layer of the KV cache that held some keys before, with all of them in `seen`; else None.

    Returns:
        Attention mass, (B, Q, G), float32, mean over the heads.

    Raises:
        UnsupportedModelError: If the module doesn't attend by one of transformers' attention functions.
    """
    if READ not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(READ, _read)
    reading = _Reading(module.config._attn_implementation, columns)
    shadow = copy.copy(module)
    shadow.config = _Instead(module.config, _attn_implementation=READ)
    shadow.training = False  # no attention dropout here
    held = None if past is None else _Held(past.seen, past, module.layer_idx)
    kwargs = {**kwargs, CACHE: held, "vltok_reading": reading}
    with contextlib.suppress(_ReadError):
        type(module).forward(shadow, *args, **kwargs)
    if reading.mass is None:
        raise unreadable(module)
    return reading.mass


def unreadable(attention: object) -> UnsupportedModelError:
    """What to say of a decoder whose attention can't be read."""
    return UnsupportedModelError(
        f"{type(attention).__name__} shows no queries and keys: it doesn't attend by one of transformers' attention "
        "functions, or its layer hands it no keyword arguments; dropping visual tokens inside the decoder needs that. "
        "Methods that prune before the decoder work (for ToDRE relevance=False)"
    )


# Reading the attention of a vision tower while it encodes pictures


def rows_of_tower(module: nn.Module, args: tuple, kwargs: dict[str, Any], kind: AttentionKind) -> torch.Tensor:
    """Attention over the tower's tokens, from the query and key projections as they are now, adapters included.

    Args:
        module: An attention module, about to run.
        args: Its arguments.
        kwargs: Its keyword arguments.
        kind: "cls" for the first query's row, "received" for the mean over all queries.

    Returns:
        Attention, (R, S), float32.
    """
    tokens = args[0] if args else kwargs["hidden_states"]
    norms = [getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    queries = module.q_proj(tokens[:, :1] if kind == "cls" else tokens)
    query, key = norms[0](queries), norms[1](module.k_proj(tokens))
    heads = num_heads(module)
    scale = attention_scale(module) or (key.shape[-1] // heads) ** -0.5
    with torch.autocast(key.device.type, enabled=False):
        return (cls_attention if kind == "cls" else received_attention)(query, key, heads, scale)


class TowerReader:
    """Stands before the attention of a tower's layer, and reads it for the encoding under way that asked for it."""

    def __init__(self, tape: Any, request: AttentionRequest, read: Any) -> None:
        self.tape = tape
        self.request = request
        self.read = read

    @torch.no_grad()
    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoding = self.tape.encoding  # none while a backward pass recomputes a checkpointed layer
        if encoding is not None and encoding.request == self.request:
            encoding.attention = self.read(module, args, kwargs, self.request.kind)
