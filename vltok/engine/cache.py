"""What is known of a pruned KV cache. It is kept on the cache object itself, so copies of the cache carry it along."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vltok.errors import UnsupportedInputError

_ATTRIBUTE = "_vltok_pruned"


@dataclass
class PrunedCache:
    """Which entries of each decoder layer's cache are real, and how long the sequence is for the outside world.

    Attributes:
        length: Tokens the caller has fed in so far, the logical length.
        next_position: Position of the next token where the caller gives none, (B,).
        shift: How far re-indexed positions lie behind the caller's, (B,), or None if positions are kept.
        prompt_length: Entries of the first layer after the prefill; a cache can't be cropped below it.
        real: For each group of layers, which entries hold kept tokens, (B, P), or None if all do.
        group: For each decoder layer, its group.
        entries: For each group, how many entries its layers hold.
    """

    length: int
    next_position: torch.Tensor
    shift: torch.Tensor | None
    prompt_length: int
    real: list[torch.Tensor | None]
    group: list[int]
    entries: list[int] = field(default_factory=list)

    @staticmethod
    def of(cache: object | None) -> PrunedCache | None:
        """Return the record of a cache, or None if nothing was pruned from it (or it was emptied since)."""
        record = getattr(cache, _ATTRIBUTE, None)
        if record is not None and cache.get_seq_length() == 0:
            delattr(cache, _ATTRIBUTE)
            return None
        return record

    def keep_on(self, cache: object) -> None:
        """Write this record on the cache."""
        setattr(cache, _ATTRIBUTE, self)

    def follow(self, held: int, batch: int) -> None:
        """Bring the record in line with a cache that was cropped at its end or repeated along the batch.

        Args:
            held: Entries the first layer holds now.
            batch: Rows that arrive with the next tokens.

        Raises:
            UnsupportedInputError: If the cache no longer fits the record.
        """
        removed = self.entries[0] - held
        if removed < 0 or held < self.prompt_length:
            raise UnsupportedInputError(
                f"the KV cache holds {held} entries where {self.entries[0]} were expected (at least the "
                f"{self.prompt_length} of the pruned prompt); a pruned cache can only be extended, or cropped back to "
                "its prompt"
            )
        if removed:
            self.length -= removed
            self.next_position = self.next_position - removed
            self.entries = [entries - removed for entries in self.entries]
            self.real = [None if real is None else real[:, :-removed] for real in self.real]
        rows = len(self.next_position)
        if batch != rows:
            if batch % rows:
                raise UnsupportedInputError(f"the pruned KV cache was filled for {rows} rows, but {batch} rows came")
            repeat = batch // rows
            self.next_position = self.next_position.repeat_interleave(repeat)
            self.shift = None if self.shift is None else self.shift.repeat_interleave(repeat)
            self.real = [None if real is None else real.repeat_interleave(repeat, 0) for real in self.real]

    def extend(self, fresh: torch.Tensor | None, count: int) -> None:
        """Add `count` new tokens; `fresh` (B, count) says which are real, None that all are."""
        for group, real in enumerate(self.real):
            if real is None and fresh is not None:
                real = fresh.new_ones(fresh.shape[0], self.entries[group])
            if real is not None:
                new = fresh if fresh is not None else real.new_ones(real.shape[0], count)
                self.real[group] = torch.cat([real, new], dim=1)
        self.length += count
        self.next_position = self.next_position + count
        self.entries = [entries + count for entries in self.entries]
