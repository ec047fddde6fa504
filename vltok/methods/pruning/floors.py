"""The floors that every selector has to beat: random tokens, and tokens at even distances. Both are training-free.

Random picks depend on the image, the seed and nothing else: not on the batch, the device or any generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.checks import check_integer
from vltok.method import register
from vltok.methods.pruning.selector import Selector
from vltok.visual import VisualTokens

_WEYL = 0x9E3779B97F4A7C15


def position_hash(keys: torch.Tensor, num_positions: int, seed: int = 0) -> torch.Tensor:
    """Give every position of every image a number that looks random: a counter-based generator (SplitMix64).

    Args:
        keys: A number per image, (B,), int64.
        num_positions: Positions per image, N.
        seed: Any integer; its low 64 bits count.

    Returns:
        Hashes, (B, N), int64, uniform over all values.
    """
    streams = _mix(keys.long() ^ _signed(seed * _WEYL)).unsqueeze(1)
    counter = torch.arange(1, num_positions + 1, device=keys.device)
    return _mix(streams + counter * _signed(_WEYL))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _mix(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), in int64 that wraps around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & (2 ** (64 - bits) - 1)  # int64 would drag the sign in


def select_random(image_keys: torch.Tensor, num_tokens: int, num_keep: int, seed: int = 0) -> torch.Tensor:
    """Pick tokens uniformly without replacement.

    Args:
        image_keys: A number per image, (B,), int64; equal numbers get equal picks.
        num_tokens: Visual tokens per image, N.
        num_keep: How many to keep, in 1..N.
        seed: Another seed gives other picks.

    Returns:
        Kept positions, (B, num_keep), ascending, int64.

    Raises:
        ValueError: If `num_keep` is outside 1..N.
    """
    if not 1 <= num_keep <= num_tokens:
        raise ValueError(f"num_keep must be in 1..{num_tokens} (the visual tokens), got {num_keep}")
    order = position_hash(image_keys, num_tokens, seed).argsort(dim=1, stable=True)
    return order[:, :num_keep].sort(dim=1).values


@register("random")
@dataclass(frozen=True)
class RandomTokens(Selector):
    """Keep random visual tokens, the same ones whenever the same image comes.

    Attributes:
        seed: Another seed keeps other tokens.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        return select_random(visual.image_keys, visual.embeddings.shape[1], num_keep, self.seed)


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
    """Keep visual tokens at even distances in the sequence, the same positions for every image."""

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        batch, length, _ = visual.embeddings.shape
        return select_stride(length, num_keep, visual.embeddings.device).repeat(batch, 1)
