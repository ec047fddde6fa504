"""Every way attention is read: rows and columns of a softmax, and the parts of an attention module."""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltok.engine.names import CACHE
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.views import AttentionKind, AttentionRequest

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


# Reading the attention of a vision tower while it encodes pictures, by running it once more for its queries and keys

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
        shadow.config = _Instead(module.config, _attn_implementation=READ_TOWER)
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
