"""The state of one call: made when the model is entered, handed down to the decoder as a keyword, gone with the call.

A call is a plain object, which nothing on the way rebuilds. It holds no tensor with a graph once the call is over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vltok.engine.cache import PrunedLayer, left_out_before
from vltok.engine.layout import since_begin
from vltok.engine.masks import Keys, gather_mask, make_mask, stores_of, windows_of
from vltok.errors import UnsupportedInputError


class Hints:
    """What only the model's head is told: where answers and guesses begin. Travels to the model it wraps.

    Attributes:
        labels: (B, T), int64, or None.
        guesses: Tokens at the end that a draft model guessed.
    """

    def __init__(self, labels: torch.Tensor | None = None, guesses: int = 0) -> None:
        self.labels = labels
        self.guesses = guesses


class Call:
    """A call on a model whose tokens are not all there: a prompt that is being pruned, or what comes after one.

    Attributes:
        cache: The KV cache it came with, if any.
        base: Tokens fed in before.
        length: Tokens that come now, T, dropped ones included.
        mask: The caller's attention mask: (B, base + T), ready-made maps by kind of layer, or None.
        device: Where the tokens are.
        groups: For each decoder layer, the number of the layout it works on.
        stores: For each decoder layer, the one whose keys it attends to: itself, or an earlier one that shares them.
        has_entered: Whether the language model has met this call.
        has_reached_layers: Whether its layers have.
    """

    __slots__ = (
        "__weakref__",
        "_keys",
        "_known",
        "_masks",
        "_open",
        "base",
        "cache",
        "config",
        "device",
        "groups",
        "has_entered",
        "has_reached_layers",
        "length",
        "maps",
        "mask",
        "states",
        "stores",
        "windows",
    )

    def __init__(self, cache: Any, base: int, length: int, mask: Any) -> None:
        self.cache = cache
        self.base = base
        self.length = length
        self.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self.maps = _maps(mask)
        self.has_entered = self.has_reached_layers = False
        self.states: list[torch.Tensor] | None = None
        self._masks: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Keys, bool]] = {}
        self._keys: dict[int, tuple[Keys, bool]] = {}  # of each layer that has run
        if self.mask is not None and self.mask.shape[1] != base + length:
            raise UnsupportedInputError(
                f"{length} tokens came on top of {base} that were fed in before, but attention_mask has "
                f"{self.mask.shape[1]} columns; it must have one for each of the {base + length} tokens, those of "
                "earlier turns and dropped ones included"
            )

    def enter(self, config: Any, layers: int, device: torch.device) -> None:
        """The language model begins, with so many layers of this config."""
        self.has_entered = True
        self.config = config
        self.device = device
        self.groups = [0] * layers
        self.windows = windows_of(config, layers)
        self.stores = stores_of(config, layers)
        self.mask = None if self.mask is None else self.mask.to(device).bool()
        self._open = self.mask is None or bool(self.mask.all())

    @property
    def attending(self) -> list[int]:
        """The decoder layers that have attention maps."""
        return [index for index, window in enumerate(self.windows) if not window.is_recurrent]

    def past(self, index: int) -> PrunedLayer | None:
        """The cache layer of a decoder layer, if it holds entries of earlier calls."""
        layers, store = getattr(self.cache, "layers", None) or (), self.stores[index]
        layer = layers[store] if store < len(layers) else None
        return layer if isinstance(layer, PrunedLayer) else None

    def new_labels(self, group: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Original indices of the slots of a group, as queries and as keys, (B, P) each, and whether none is -1."""
        raise NotImplementedError

    def samples(self) -> torch.Tensor | None:
        """The packed sample of each token, (B, T), or None."""
        return None

    def starts(self) -> torch.Tensor:
        """First token of each row that is no padding, (B | 1, 1), or of each token's packed sample, (B, T)."""
        if self.mask is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.mask.int().argmax(1, keepdim=True)

    @property
    def is_reindexed(self) -> bool:
        """Whether positions count the kept tokens alone."""
        raise NotImplementedError

    def mask_of(self, index: int, hidden: torch.Tensor) -> Any:
        """The mask of a decoder layer that is about to run, for hidden states (B, P, D)."""
        window, past, group = self.windows[index], self.past(index), self.groups[index]
        if window.is_recurrent:
            return self._padding(group)
        holder = self.stores[index]
        store = self.groups[holder]
        if holder != index:  # it has run, and its cache has grown
            mark = (group, store, holder)
            self._known.setdefault(mark, self._share(holder, group, store))
        else:
            mark = (group, store, None if past is None else (past.group, past.entries))
            if mark not in self._known:
                self._known[mark] = self._look(past, group, store)
        keys, is_plain = self._known[mark]
        self._keys[index] = keys, is_plain
        if (mark, window) not in self._masks:
            ready = self.maps.get(window.kind, self.maps.get(None))
            if ready is None:
                mask = make_mask(self.config, hidden, window, keys, is_plain)
            else:
                mask = self._cut(ready, keys)
                if keys.ranks is not None and window.size and window.kind in self.maps:
                    # The map's window counts dropped tokens, too. Without them, more comes into sight.
                    whole = self.maps.get("full_attention")
                    whole = mask.new_full((), mask.dtype == torch.bool) if whole is None else self._cut(whole, keys)
                    mask = torch.where(keys.all_seen(window), whole, mask)
            self._masks[mark, window] = mask
        return self._masks[mark, window]

    def _cut(self, ready: torch.Tensor, keys: Keys) -> torch.Tensor:
        """A ready-made map for the queries and keys of a layer; one of a sliding cache has the last columns only."""
        first = self.base + self.length - ready.shape[-1]
        return gather_mask(ready, keys.queries - self.base, (keys.keys - first).clamp(min=-1))

    def _padding(self, group: int) -> torch.Tensor | None:
        """For layers that hold a state: which slots are no padding, (B, P), bool; None if none is."""
        labels = self.new_labels(group)[1]
        if not self._open:
            seen = self.mask.expand(len(labels), -1).gather(1, labels.clamp(min=0))
            labels = labels.masked_fill(~seen, -1)
        return None if bool((labels >= 0).all()) else labels >= 0

    def _look(self, past: PrunedLayer | None, group: int, store: int) -> tuple[Keys, bool]:
        """What queries and keys of a layer stand for, and whether nothing is hidden by anything but order."""
        queries, _, _ = self.new_labels(group)
        _, labels, is_full = self.new_labels(store)
        gone = 0  # entries that a window let go of
        if past is not None:
            gone = past.index.shape[1] + past.tail - past.entries
            if past.is_sliding:  # one that records the past holds more than attention gets
                gone += max(0, past.entries - past.inner.sliding_window + 1)
            labels = torch.cat([past.labels().to(labels.device).expand(len(labels), -1), labels], dim=1)
        if not self._open:
            seen = self.mask.expand(len(labels), -1).gather(1, labels.clamp(min=0))
            labels = labels.masked_fill(~seen, -1)
        samples, ranks = self.samples(), None
        if self.is_reindexed:
            ranks = (labels >= 0).cumsum(1)
            if samples is not None:
                ranks = ranks - since_begin(samples.gather(1, labels.clamp(min=0)), ranks - 1)
            ranks = ranks[:, gone:]
        starts = self.starts()
        starts = starts.expand(len(labels), starts.shape[1])
        is_plain = is_full and self._open and (past is None or past.is_full) and samples is None and group == store
        return Keys(queries, labels[:, gone:], samples, starts, ranks), is_plain

    def _share(self, holder: int, group: int, store: int) -> tuple[Keys, bool]:
        """What `_look` says of a layer that attends to the keys of another one."""
        keys, is_plain = self._keys[holder]
        return (keys, is_plain) if group == store else (replace(keys, queries=self.new_labels(group)[0]), False)

    def sees(self, index: int, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Which keys some queries of a layer that has its mask see, as index and window say.

        Args:
            index: The decoder layer.
            rows: A batch row for each of N samples, (N,).
            slots: Queries of these, (N, Q).

        Returns:
            (N, Q, E), bool.
        """
        keys, _ = self._keys[index]
        every = torch.arange(keys.keys.shape[1], device=keys.keys.device)
        return keys.see(self.windows[index], rows[:, None, None], slots[..., None], every)

    def spread(self, index: int, attention: torch.Tensor) -> torch.Tensor:
        """Bring the attention map of a layer back to logical length.

        Args:
            index: The decoder layer.
            attention: (B, H, Q, E).

        Returns:
            (B, H, Q, base + T), zero where a key is gone.
        """
        keys, is_plain = self._keys[index]
        total = self.base + self.length
        if is_plain and attention.shape[-1] == total:
            return attention
        labels = keys.keys.to(attention.device)
        columns = labels.masked_fill(labels < 0, total)[:, None, None].expand_as(attention)
        spread = attention.new_zeros(*attention.shape[:-1], total + 1)
        return spread.scatter(-1, columns, attention)[..., :total]


class Continuation(Call):
    """Tokens without new images on top of a pruned cache."""

    __slots__ = ("batch", "first")

    def __init__(self, cache: Any, tokens: torch.Tensor, mask: Any) -> None:
        super().__init__(cache, cache.get_seq_length(), tokens.shape[1], mask)
        self.batch = len(tokens)
        self.first = next(layer for layer in cache.layers if isinstance(layer, PrunedLayer))
        if len(self.first.index) != self.batch:
            raise UnsupportedInputError(
                f"the pruned KV cache was filled for {len(self.first.index)} rows, but {self.batch} rows came; call "
                "cache.batch_repeat_interleave(n) or cache.batch_select_indices(rows) first"
            )

    @property
    def is_reindexed(self) -> bool:
        return self.first.reindex

    def new_labels(self, group: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        labels = torch.arange(self.base, self.base + self.length, device=self.device).expand(self.batch, -1)
        return labels, labels, True

    def place(self, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Positions of the new tokens: the caller's, less what was left out where positions count kept tokens."""
        if position_ids is None:
            steps = torch.arange(self.base, self.base + self.length, device=self.first.delta.device)
            return self.first.delta.unsqueeze(-1) + steps
        return position_ids - self.left_out().to(position_ids.device) if self.first.reindex else position_ids

    def left_out(self) -> torch.Tensor:
        """Tokens that the caller counts in positions and the cache doesn't hold, (B, 1)."""
        return left_out_before(self.cache, self.mask, self.base)


def _maps(mask: Any) -> dict[str | None, torch.Tensor]:
    """Ready-made attention maps of a caller: by kind of layer, or one for all under None."""
    if isinstance(mask, dict):
        return {kind: value for kind, value in mask.items() if isinstance(value, torch.Tensor)}
    return {None: mask} if isinstance(mask, torch.Tensor) and mask.dim() == 4 else {}
