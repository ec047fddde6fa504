"""Attention masks by original index: full, sliding, chunked, packed, and maps that callers bring along.

A query sees a key that stands for a token at or before its own, that the caller does not hide, of the same packed
sample and within the window. All of this is said in indices of the sequence as it was before pruning, so it holds for
packed rows, for old entries of a cache, and for what came after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_recurrent_attention_mask,
)

from vltok.engine.layout import take
from vltok.errors import UnsupportedInputError

RECURRENT = frozenset(
    kind for kind, make in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items() if make is create_recurrent_attention_mask
)


@dataclass(frozen=True)
class Window:
    """What a decoder layer sees of the past.

    Attributes:
        kind: "full_attention", "sliding_attention" or "chunked_attention", as configs write it; any other word where
            the layer holds a state of all that came before, as linear attention and convolutions do.
        size: Tokens of the window, or of a chunk; 0 for full attention.
    """

    kind: str = "full_attention"
    size: int = 0

    @property
    def is_recurrent(self) -> bool:
        """Whether the layer holds a state instead of keys and values."""
        return self.kind in RECURRENT


def windows_of(config: Any, layers: int) -> list[Window]:
    """The window of each of so many decoder layers, read from the decoder's config."""
    types = getattr(config, "layer_types", None)
    sizes = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    if not types:
        types = [next((kind for kind, size in sizes.items() if size), "full_attention")] * layers
    windows = {
        kind: Window(kind, sizes.get(kind) or 0) if sizes.get(kind) or kind in RECURRENT else Window() for kind in types
    }
    return [windows[kind] for kind in types]


def stores_of(config: Any, layers: int) -> list[int]:
    """For each of so many decoder layers, the one whose keys and values it attends to: itself, unless they share."""
    modes, types = getattr(config, "kv_sharing_modes", None), getattr(config, "layer_types", None)
    if not modes or "reuse" not in modes:
        return list(range(layers))
    kept = {kind: number for number, (mode, kind) in enumerate(zip(modes, types, strict=True)) if mode != "reuse"}
    return [
        kept[kind] if mode == "reuse" else number for number, (mode, kind) in enumerate(zip(modes, types, strict=True))
    ]


@dataclass(frozen=True)
class Keys:
    """What the keys of a layer, and its queries, stand for.

    Attributes:
        queries: Original index of each query, (B, Q), int64; -1 for slots that stand for nothing.
        keys: Original index of each key, (B, E), int64; -1 for those nobody may see.
        samples: The packed sample each position belongs to, (B, T), int64, or None where rows hold one sample each.
        starts: Where chunks are counted from: the first position of each row that is no padding, (B, 1), or of each
            position's packed sample, (B, T), int64.
        ranks: Which of the keys seen so far each key is, from 1, (B, E), where windows count those; None where they
            count the tokens.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    samples: torch.Tensor | None
    starts: torch.Tensor
    ranks: torch.Tensor | None

    def see(self, window: Window, row: Any, query: Any, key: Any) -> torch.Tensor:
        """Whether a query sees a key, for index tensors of any shapes that broadcast."""
        q, k = self.queries[row, query], self.keys[row, key]
        seen = (k >= 0) & (k <= q)
        if self.samples is not None:
            seen = seen & (self.samples[row, q.clamp(min=0)] == self.samples[row, k.clamp(min=0)])
        if window.size:
            if self.ranks is not None:
                # A query's own rank is that of the last key at or before it: its own, unless it is no key itself.
                last = self.keys.where(self.keys >= 0, -1).cummax(1).values
                own = torch.searchsorted(last, self.queries.contiguous(), right=True)
                own = self.ranks.gather(1, (own - 1).clamp(min=0))
                q, k = own[row, query], self.ranks[row, key]
            if window.kind == "sliding_attention":
                seen = seen & (k > q - window.size)
            else:
                start = 1  # of ranks
                if self.ranks is None:
                    start = self.starts[row, 0 if self.samples is None else q.clamp(min=0)]
                seen = seen & ((q - start) // window.size == (k - start) // window.size)
        return seen

    def all_seen(self, window: Window) -> torch.Tensor:
        """Whether each query sees each key, (B, 1, Q, E), bool."""
        sides = (*self.queries.shape, self.keys.shape[1])
        row, query, key = torch.meshgrid(*(torch.arange(n, device=self.keys.device) for n in sides), indexing="ij")
        return self.see(window, row, query, key).unsqueeze(1)


def make_mask(config: Any, like: torch.Tensor, window: Window, keys: Keys, is_plain: bool) -> Any:
    """Make the mask of a layer for the attention implementation of its config.

    Args:
        config: The decoder's config.
        like: Hidden states, (B, Q, D), for dtype and device.
        window: What the layer sees of the past.
        keys: What queries and keys stand for.
        is_plain: Whether nothing but the order of the tokens decides who sees whom, as far as the caller knows.

    Returns:
        The mask as transformers' mask functions give it, or None where attention needs none.

    Raises:
        UnsupportedInputError: If this implementation can't be told what to hide.
    """
    name = config._attn_implementation
    count, held = keys.queries.shape[1], keys.keys.shape[1]
    if "flash" in name:
        return _flash_mask(name, window, keys, is_plain)
    if is_plain and not window.size and (count == 1 or (name == "sdpa" and count == held)):
        return None
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        if is_plain and not window.size:
            return None
        raise UnsupportedInputError(
            f"the attention implementation {name!r} takes no mask, which this batch needs to hide padding, windows or "
            'dropped tokens; load the model with attn_implementation="sdpa"'
        )
    return ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=len(keys.queries),
        q_length=count,
        kv_length=held,
        q_offset=0,
        kv_offset=0,
        mask_function=lambda row, head, query, key: keys.see(window, row, query, key),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=like.dtype,
        config=config,
        use_vmap=False,
        device=like.device,
    )


def _flash_mask(name: str, window: Window, keys: Keys, is_plain: bool) -> torch.Tensor | None:
    """Flash attention takes which keys are real, (B, E): it counts windows in keys, and samples by positions."""
    if keys.samples is not None and len(keys.queries) > 1:
        raise UnsupportedInputError(
            f"{name!r} tells packed samples apart in a batch of one row only, and {len(keys.queries)} rows came; pack "
            'into one row, or use attn_implementation="sdpa"'
        )
    if window.size and keys.ranks is None:
        oldest = keys.keys.masked_fill(keys.keys < 0, torch.iinfo(torch.int64).max).amin(1)
        if bool((keys.queries.amax(1) - oldest >= window.size).any()):
            raise UnsupportedInputError(
                f"the prompt is longer than the window of {window.size} tokens, which {name!r} would count in kept "
                'tokens; use attn_implementation="sdpa", or positions="reindex"'
            )
    return None if is_plain or keys.samples is not None else keys.keys >= 0


def gather_mask(mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cut a ready-made attention map down to the tokens that are left.

    Args:
        mask: (1 | B, 1 | H, T, S), bool (True is seen) or float (added to the scores). S counts all keys.
        queries: Which row of the map each query takes, (B, Q), int64; for a negative one the first.
        keys: Which column each key takes, (B, E), int64; -1 hides a key.

    Returns:
        (B, 1 | H, Q, E), of the same kind.
    """
    mask = take(mask.expand(len(queries), *mask.shape[1:]).transpose(1, 2), queries.clamp(min=0)).transpose(1, 2)
    mask = take(mask.movedim(-1, 1), keys.clamp(min=0)).movedim(1, -1)
    hidden = (keys < 0)[:, None, None].to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def seen_by_any(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the last `length` keys a ready-made map shows to any query, (1 | B, length), bool."""
    columns = mask[..., mask.shape[-1] - length :]
    seen = columns if mask.dtype == torch.bool else columns > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)


def packed_samples(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Number the samples packed into each row: one begins wherever positions don't go on by one.

    Args:
        position_ids: (B, T), int64.

    Returns:
        The number of each token's sample, (B, T), from 0, or None where each row holds one sample.
    """
    steps = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1)
    samples = (steps != 1).cumsum(-1)
    return samples if bool(samples[:, -1].any()) else None
