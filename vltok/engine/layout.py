"""Layout: which positions of a padded batch stay, where they stand, and the way back. Pure tensor code.

Rows are packed to the RIGHT edge. Two rows of six positions, v visual, t text, p padding; some visual tokens leave:

    position      0 1 2 3 4 5        slot       0 1 2 3
    row 0         t v v v v t   ->   holds      0 1 3 5     positions 2 and 4 left
    row 1         p p t v v t   ->   holds      - 2 3 5     slot 0 is filled up

A position that left has the slot of the last one kept before it: in row 0, position 2 reads what stands for position 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The kept positions of a (B, T) batch packed to the right into (B, P), P the longest row.

    Attributes:
        order: Which position of the sequence stands in each slot, (B, P), int64. Rows shorter than P are filled up in
            front with positions that were not kept.
        real: Which slots hold kept positions, (B, P), bool. The others must be masked.
        slot: The slot of each position, (B, T), int64. A position that was not kept has the slot of the last kept one
            before it, or of the first kept one: what is predicted there is what is predicted after the last token that
            is still seen.
        is_whole: Whether every position is kept, so that tensors pass as they are.
    """

    order: torch.Tensor
    real: torch.Tensor
    slot: torch.Tensor
    is_whole: bool = False

    @classmethod
    def from_mask(
        cls, keep: torch.Tensor, length: int, samples: torch.Tensor | None = None, is_whole: bool = False
    ) -> Layout:
        """Pack the positions where `keep` (B, T) is true.

        Args:
            keep: What is kept.
            length: The largest row count of `keep`, at least 1.
            samples: The packed sample of each position, (B, T); none reads what stands for another. None if rows hold
                one sample each.
            is_whole: Whether everything is kept.
        """
        order = torch.argsort(keep, dim=1, stable=True)[:, keep.shape[1] - length :]
        start = length - keep.sum(1, keepdim=True)  # of the kept tokens of each row
        slot = (start + keep.cumsum(1) - 1).maximum(start).clamp(max=length - 1)
        if samples is not None:
            is_strange = samples.gather(1, order.gather(1, slot)) != samples
            slot = torch.where(is_strange, (slot + 1).clamp(max=length - 1), slot)
        return cls(order, torch.arange(length, device=keep.device) >= start, slot, is_whole)

    def pack(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Bring (..., T, ...) into slots, (..., P, ...); the batch is the dimension before T.

        Args:
            x: (B, T, ...) with dim=1, or (..., B, T) with dim=-1. A batch of 1 is expanded.
            dim: Where T is: 1 or -1.
        """
        if self.is_whole:
            return x.expand(*x.shape[:-2], *self.order.shape) if dim == -1 else x.expand(len(self.order), *x.shape[1:])
        return take(x, self.order, dim)

    def unpack(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Bring (B, P, ...) back to the length of the sequence, (B, T, ...); with dim=-2 (..., B, P, C)."""
        return x if self.is_whole else take(x, self.slot, dim)

    def within(self, outer: Layout) -> torch.Tensor:
        """Slots of `outer` that this (smaller) layout takes its rows from, (B, P)."""
        return outer.slot.gather(1, self.order)


def take(x: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Gather rows along `dim`, by an index of its own for every sample.

    Args:
        x: (B | 1, T, ...) with dim=1; (..., B | 1, T) with dim=-1; (..., B | 1, T, C) with dim=-2.
        index: (B, P), int64, on any device.
        dim: Where T is: 1, -1 or -2.

    Returns:
        The rows, with P in the place of T.
    """
    index = index.to(x.device)
    if dim == -2 and x.dim() == 3:
        dim = 1
    if dim != 1:
        x, rows = x.movedim(dim, -1), index
        x = x.expand(*x.shape[:-2], *rows.shape[:1], x.shape[-1]) if dim == -1 else x
        if dim == -2:  # (..., B, C, T)
            x = x.expand(*x.shape[:-3], *rows.shape[:1], *x.shape[-2:])
            rows = rows.unsqueeze(-2)
        return x.gather(-1, rows.expand(*x.shape[:-1], index.shape[1])).movedim(-1, dim)
    x = x.expand(index.shape[0], *x.shape[1:])
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))


def since_begin(samples: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The value at the first place of each place's sample, for values that never fall along a row, (B, T) both."""
    begins = torch.diff(samples, dim=1, prepend=samples[:, :1] - 1) != 0
    return torch.where(begins, values, 0).cummax(1).values
