"""Layout: which positions of a padded batch stay, where they stand, and the way back. Pure tensor code."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The kept positions of a (B, T) batch packed to the left into (B, P), P the longest row.

    Attributes:
        order: Which position of the sequence stands in each slot, (B, P), int64. Rows shorter than P are filled up with
            positions that were not kept.
        real: Which slots hold kept positions, (B, P), bool. The others must be masked.
        slot: The slot of each position, (B, T), int64. A position that was not kept has the slot of the last kept one
            before it: what is predicted there is what is predicted after the last token that is still seen.
    """

    order: torch.Tensor
    real: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def from_mask(cls, keep: torch.Tensor, length: int) -> Layout:
        """Pack the positions where `keep` (B, T) is true; `length` is its largest row count."""
        order = torch.argsort(keep.logical_not(), dim=1, stable=True)[:, :length]
        count = keep.sum(1, keepdim=True)
        return cls(
            order=order,
            real=torch.arange(length, device=keep.device) < count,
            slot=keep.cumsum(1).sub(1).clamp(min=0),
        )

    def pack(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Bring (..., T, ...) into slots, (..., P, ...); the batch is the dimension before the last common one.

        Args:
            x: (B, T, ...) with dim=1, or (..., B, T) with dim=-1. A batch of 1 is expanded.
            dim: Where T is: 1 or -1.
        """
        return _take(x, self.order, dim)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Bring (B, P, ...) back to the length of the sequence, (B, T, ...)."""
        return _take(x, self.slot, 1)

    def within(self, outer: Layout) -> torch.Tensor:
        """Slots of `outer` that this (smaller) layout takes its rows from, (B, P)."""
        return outer.slot.gather(1, self.order)


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    if dim == -1:  # (..., B, T)
        x = x.expand(*x.shape[:-2], *index.shape[:1], x.shape[-1])
        return x.gather(-1, index.expand(*x.shape[:-1], index.shape[1]))
    x = x.expand(index.shape[0], *x.shape[1:])
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))
