"""Every way attention is read: rows and columns of a softmax, and the parts of an attention module."""

from __future__ import annotations

import contextlib
import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltok.engine.instead import Instead
from vltok.engine.names import CACHE
from vltok.errors import UnsupportedModelError

# Rows and columns of a softmax attention, exact and without the N x N map


def cls_attention(
    query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the first query, mean over the heads.

    Args:
        query: Queries, (B, H, S, d).
        key: Keys, (B, H or fewer, S, d).
        scale: Factor of their products.
        mask: What is added to the products, or which of them count, bool: (B or 1, H or 1, S or 1, S). None for all.

    Returns:
        Attention, (B, S), float32; each row sums to 1.
    """
    return _probabilities(query[:, :, :1], key, scale, None if mask is None else mask[:, :, :1]).mean(1).squeeze(1)


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    at_once: int = 2**25,
) -> torch.Tensor:
    """Attention that every token receives from all queries together, mean over the heads.

    Tokens that no query may see are padding; they receive nothing, and what they give doesn't count.

    Args:
        query: Queries, (B, H, S, d).
        key: Keys, (B, H or fewer, S, d).
        scale: Factor of their products.
        mask: As in `cls_attention`.
        at_once: Products to hold at a time, at least those of one query of each row; never all B * H * S * S.

    Returns:
        Attention received, (B, S), float32; the tokens of a row, padding left out, receive 1 on average.
    """
    batch, heads, length, _ = query.shape
    is_real = query.new_ones(batch, length, dtype=torch.float32)
    if mask is not None:
        is_real = is_real * (mask if mask.dtype == torch.bool else mask > _lowest(mask) / 2).any(2).any(1)
    total = torch.zeros_like(is_real)
    rows = max(1, at_once // max(1, batch * heads * length))
    for start in range(0, length, rows):
        own = slice(start, start + rows)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, own]
        total += (_probabilities(query[:, :, own], key, scale, seen).mean(1) * is_real[:, own, None]).sum(1)
    return total * is_real


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(scale q K^T + mask), (B, H, Q, S), float32."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.mT * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, _lowest(logits)) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def _lowest(values: torch.Tensor) -> float:
    return torch.finfo(values.dtype).min


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


# Reading the attention of a decoder layer, by running it once more up to where it attends

READ = "vltok_read"  # the attention implementation that reads; registered with transformers when first needed


class _ReadError(Exception):
    """Ends an attention that was run for its queries and keys alone."""


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


@dataclass(frozen=True)
class Attending:
    """What a decoder layer attends by, as its attention function gets it: norms and rotary positions are in it.

    Attributes:
        module: The attention, a copy that drops nothing out.
        name: Its attention implementation.
        query: Queries, (B, H, S, d).
        key: Keys, those of earlier calls first, (B, H or fewer, E, d).
        value: Values, (B, H or fewer, E, d).
        mask: Its mask, of whatever kind.
        options: What else the function gets.
    """

    module: nn.Module
    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    options: dict[str, Any]

    @torch.no_grad()
    def mass(self, columns: torch.Tensor) -> torch.Tensor:
        """Say how much each query attends to groups of keys, by the layer's own kernel and without the map.

        Args:
            columns: The groups of keys, (B, E, G), bool.

        Returns:
            Attention mass, (B, S, G), float32, mean over the heads.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.name, self._eager)
        value = self.value
        values = indicator_values(columns.to(value.device), value.shape[1], value.shape[-1], value.dtype)
        values = values.unflatten(-1, value.shape[1::2]).transpose(1, 2)
        output, _ = attend(self.module, self.query, self.key, values, self.mask, **self.options)  # (B, S, H, d)
        return attention_mass(output.flatten(2), output.shape[-1], columns.shape[-1])

    @torch.no_grad()
    def of_queries(self, rows: torch.Tensor, slots: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The attention of a few queries over all keys, by the model's own eager function on these alone.

        Args:
            rows: The batch row of each of N samples, (N,).
            slots: Their queries, (N, Q).
            seen: Which keys these see, (N, Q, E), bool, where the layer's mask is no map that tells.

        Returns:
            Attention, (N, Q, E), float32 whatever the model's dtype, mean over the heads.

        Raises:
            UnsupportedModelError: If the model's code has no eager function.
        """
        if self._eager is None:
            raise unreadable(self.module)
        device = self.query.device
        rows, slots, mask = rows.to(device), slots.to(device), seen.to(device).unsqueeze(1)
        pairs = rows.unsqueeze(1), slice(None), slots
        if isinstance(self.mask, torch.Tensor) and self.mask.dim() == 4:  # (1 | B, 1 | H, S, E)
            mask = self.mask.expand(len(self.query), *self.mask.shape[1:])[pairs].transpose(1, 2)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
        query = self.query[pairs].transpose(1, 2)  # (N, H, Q, d)
        key, value = self.key[rows], self.value[..., :1][rows]
        with torch.autocast(device.type, enabled=False):
            _, weights = self._eager(
                self.module, query.float(), key.float(), value.float(), mask.float(), **self.options
            )
        return weights.float().mean(1)

    @property
    def _eager(self) -> Any:
        return getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)


def _read(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> None:
    name, found = kwargs.pop("vltok_reading")
    found.append(Attending(module, name, query, key, value, mask, kwargs))
    raise _ReadError


@torch.no_grad()
def decoder_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any], past: Any) -> Attending:
    """Get what the attention of a decoder layer attends by.

    The module runs again on what it just ran on, up to its attention function, as a copy of its own that other threads
    don't see.

    Args:
        module: The attention of a decoder layer.
        args: Its arguments in the forward that just ran.
        kwargs: Its keyword arguments there.
        past: The layer of the KV cache that held some keys before, with all of them in `seen`; else None.

    Raises:
        UnsupportedModelError: If the module doesn't attend by one of transformers' attention functions.
    """
    if READ not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(READ, _read)
    found: list[Attending] = []
    shadow = copy.copy(module)
    shadow.config = Instead(module.config, _attn_implementation=READ)
    shadow.training = False  # no attention dropout here
    held = None if past is None else _Held(past.seen, past, module.layer_idx)
    kwargs = {**kwargs, CACHE: held, "vltok_reading": (module.config._attn_implementation, found)}
    with contextlib.suppress(_ReadError):
        type(module).forward(shadow, *args, **kwargs)
    if not found:
        raise unreadable(module)
    return found[0]


def unreadable(attention: object) -> UnsupportedModelError:
    """What to say of a decoder whose attention can't be read."""
    return UnsupportedModelError(
        f"{type(attention).__name__} shows no queries and keys: it doesn't attend by one of transformers' attention "
        "functions, or its layer hands it no keyword arguments; dropping visual tokens inside the decoder needs that. "
        "Methods that prune before the decoder work (for ToDRE relevance=False)"
    )
