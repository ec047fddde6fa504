"""Cache layers that speak logical lengths outside and hold fewer entries inside.

After a pruned prompt each layer of the cache is wrapped. Outside, its length counts the tokens fed in, dropped ones and
padding included, so that `generate`, `crop` and second turns work unaware. Inside it knows the original index of every
entry, from which the engine makes masks. A prompt of six tokens in two rows, then one more word:

    row 0    t v v v v t w    entries of   0 1 3 5 6      index 0 1 3 5 | tail 1
    row 1    p p t v v t w    entries of   - 2 3 5 6     index -1 2 3 5 | tail 1      length 7

The index ends with the last pruned prompt; the tail behind it has one entry for each of the last tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from vltok.errors import UnsupportedInputError


class PrunedLayer(CacheLayerMixin):
    """A layer of a KV cache that holds the entries of some tokens only.

    It wraps the layer it stands for, of any dynamic kind: growing, sliding, quantised, offloaded.

    Attributes:
        inner: The wrapped layer, which holds keys and values.
        length: Tokens fed in so far.
        index: Original index of each entry up to the last pruned prompt, (B, P), int64; -1 for entries that stand for
            nothing.
        tail: Entries behind these, one for each of the last tokens.
        is_full: Whether no index is -1.
        group: Layers with the same entries have the same number.
        reindex: Whether positions count the kept tokens alone.
        delta: How far the position of the next token is from `length`, (B,); only asked for where callers give none.
    """

    def __init__(
        self, inner: CacheLayerMixin, length: int, index: torch.Tensor, reindex: bool, delta: torch.Tensor
    ) -> None:
        # Keys, values and is_initialized, which the base class would set, are the wrapped layer's.
        self.inner = inner
        self.length = length
        self.index = index
        self.tail = 0
        self.is_full = True
        self.group = 0
        self.reindex = reindex
        self.delta = delta
        self._expected = 0
        self._watched = False
        self.seen: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def keys(self) -> torch.Tensor | None:
        return self.inner.keys

    @property
    def values(self) -> torch.Tensor | None:
        return self.inner.values

    @property
    def is_initialized(self) -> bool:
        return self.inner.is_initialized

    @property
    def is_sliding(self) -> bool:
        return getattr(self.inner, "is_sliding", False)

    @property
    def is_croppable(self) -> bool:
        return getattr(self.inner, "is_croppable", not hasattr(self.inner, "residual_length"))

    @property
    def entries(self) -> int:
        """Entries held."""
        held = self.index.shape[1] + self.tail
        return min(held, self.inner.keys.shape[-2]) if self.is_sliding else held

    def labels(self) -> torch.Tensor:
        """Original index of each entry, those a window let go of included, (B, E), int64; -1 stands for nothing."""
        tail = torch.arange(self.length - self.tail, self.length, device=self.index.device)
        return torch.cat([self.index, tail.expand(len(self.index), -1)], dim=1)

    def expect(self, count: int, watch: bool = False) -> None:
        """Let the next update through, which brings `count` tokens; `watch` keeps the keys it returns in `seen`."""
        self._expected = count
        self._watched = watch

    def relabel(self, labels: torch.Tensor, length: int, is_full: bool) -> None:
        """Say which tokens the last entries stand for.

        Args:
            labels: Original indices of the last P entries, (B, P), -1 for none.
            length: Tokens fed in so far, those that were dropped included.
            is_full: Whether no label is -1.
        """
        before = self.labels()
        self.index = torch.cat([before[:, : before.shape[1] - labels.shape[1]], labels], dim=1)
        self.length = length
        self.tail = 0
        self.is_full = self.is_full and is_full

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = key_states.shape[-2]
        if count != self._expected and self.index.shape[1]:
            raise UnsupportedInputError(
                "a pruned KV cache can only be continued through the whole model with its method on: the language "
                "model was called by itself, or the handle was removed while this answer was being generated; keep the "
                "handle on, or send the whole conversation with a fresh cache"
            )
        self._expected = 0
        self.length += count
        self.tail += count
        keys, values = self.inner.update(key_states, value_states, *args, **kwargs)
        self.seen = keys if self._watched else None
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.inner.lazy_initialization(*args, **kwargs)

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()

    def reset(self) -> None:
        self.inner.reset()
        if self.inner.is_initialized:  # some versions of transformers leave zeros in the place of what was held
            self.inner.keys = self.inner.values = None
            self.inner.is_initialized = False
        self.length = self.tail = 0
        self.index = self.index[:, :0]
        self.is_full = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens off the end, also dropped ones: -n takes n, a positive number is the length that remains."""
        if not self.is_croppable:
            raise UnsupportedInputError(
                f"{type(self.inner).__name__} can't give tokens back, so this cache can't be cropped; use a dynamic one"
            )
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        if count <= self.tail:
            self.inner.crop(-count)
            self.tail -= count
            self.length -= count
            return
        labels = self.labels()
        self.length = max(0, self.length - count)
        labels = labels.masked_fill(labels >= self.length, -1)
        held = int((labels >= 0).any(0).nonzero().max()) + 1 if (labels >= 0).any() else 0
        self.inner.crop(held - labels.shape[1])
        self.index, self.tail = labels[:, :held], 0
        self.is_full = bool((self.index >= 0).all())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.inner.reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)
        self.index = self.index.repeat_interleave(repeats, dim=0)
        self.delta = self.delta.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.inner.batch_select_indices(indices)
        self._take_rows(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.index.device)
        self.index, self.delta = self.index[rows], self.delta[rows]


def is_pruned(cache: object | None) -> bool:
    """Whether layers of a cache are ours and hold something; a cache that was emptied gets its own layers back."""
    layers = getattr(cache, "layers", None) or []
    if not any(isinstance(layer, PrunedLayer) for layer in layers):
        return False
    if cache.get_seq_length() > 0:
        return True
    cache.layers[:] = [layer.inner if isinstance(layer, PrunedLayer) else layer for layer in layers]
    return False


def check_cache(cache: object | None) -> None:
    """Raise UnsupportedInputError if the entries of pruned prompts can't be kept in a cache."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or hasattr(cache, "self_attention_cache"):
        raise UnsupportedInputError(
            f"visual tokens can't be pruned from a {type(cache).__name__}; use transformers' DynamicCache, or none"
        )
    if cache.is_compileable:
        raise UnsupportedInputError(
            f"{type(cache).__name__} reserves room for every token of the prompt, so pruning can't shorten it; use "
            "the default dynamic cache, or remove the handle"
        )
    for layer in cache.layers:
        inner = layer.inner if isinstance(layer, PrunedLayer) else layer
        is_known = isinstance(inner, DynamicLayer) and not hasattr(inner, "update_indexer")
        if isinstance(inner, CacheLayerMixin) and not is_known:
            raise UnsupportedInputError(
                f"visual tokens can't be pruned from a cache with {type(inner).__name__}; layers that can hold "
                "a pruned prompt are dynamic, sliding and quantised ones"
            )


def attention_layers(cache: Cache) -> dict[int, CacheLayerMixin]:
    """The layers of a cache that hold keys and values, by their number."""
    return {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)}


def left_out_before(cache: Any, mask: torch.Tensor | None, base: int) -> torch.Tensor:
    """How many of the attended tokens fed in before have no entry in the first attention layer, (B, 1)."""
    first = next(iter(attention_layers(cache).values()))
    labels = first.labels()
    if mask is None:
        return base - (labels >= 0).sum(1, keepdim=True)
    mask = mask[:, :base].to(labels.device).bool()
    held = (labels >= 0) & mask.gather(1, labels.clamp(min=0))
    return mask.sum(1, keepdim=True) - held.sum(1, keepdim=True)


def bytes_held(cache: object | None) -> int:
    """Bytes of all tensors that a cache holds as keys and values, packed ones included."""
    layers = getattr(cache, "layers", None) or ()
    inner = [layer.inner if isinstance(layer, PrunedLayer) else layer for layer in layers]
    return sum(_bytes(value) for layer in inner for value in vars(layer).values())


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.dim() > 0 else 0
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
