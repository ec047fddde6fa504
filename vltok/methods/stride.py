"""StrideTokens: keep every so many-th visual token, the floor that looks at nothing. Training-free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.selector import Selector
from vltok.views import VisualTokens


def select_stride(num_tokens: int, num_keep: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Pick positions spread evenly from the first on: round(i * N / num_keep), halves to the even position.

    Args:
        num_tokens: Visual tokens per image, N.
        num_keep: How many to keep, in 1..N.
        device: Where to put the result.

    Returns:
        Kept positions, (num_keep,), ascending, int64.

    Raises:
        ValueError: If `num_keep` is outside 1..N.
    """
    if not 1 <= num_keep <= num_tokens:
        raise ValueError(f"num_keep must be in 1..{num_tokens} (the visual tokens), got {num_keep}")
    scaled = torch.arange(num_keep, device=device) * num_tokens
    below, rest = scaled // num_keep, scaled % num_keep
    return below + (2 * rest + below % 2 > num_keep)  # in integers: a half is exact, and two picks never meet


@register("stride")
@dataclass(frozen=True)
class StrideTokens(Selector):
    """Keep visual tokens at even distances in the sequence, the same positions for every picture."""

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        batch, length, _ = visual.embeddings.shape
        return select_stride(length, num_keep, visual.embeddings.device).repeat(batch, 1)
