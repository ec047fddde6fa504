"""Intervals of shares of the unpruned score: the same samples are drawn again for both sides."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

DRAWS = 2000
Values = Mapping[str, float]  # what each sample is worth, by its number
Interval = tuple[float, float]


def drawn_means(pruned: Values, plain: Values, name: str, draws: int = DRAWS) -> np.ndarray:
    """Means of both sides over samples that are drawn with replacement, (draws, 2).

    Args:
        pruned: What the samples are worth with a method.
        plain: What the same samples are worth unpruned.
        name: Of the task; calls with the same name and number of samples draw the same ones.
        draws: How often.

    Raises:
        ValueError: If the sides have other samples.
    """
    if differ := sorted(pruned.keys() ^ plain.keys()):
        raise ValueError(f"{name}: both sides need the same samples, but one alone has {len(differ)}: {differ[:5]}")
    values = np.array([[pruned[key], plain[key]] for key in sorted(plain)])  # (samples, 2)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return np.stack([values[generator.integers(len(values), size=len(values))].mean(axis=0) for _ in range(draws)])


def share_draws(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Shares of the unpruned score of tasks that count alike, (draws,); not finite where the unpruned score is 0.

    Args:
        parts: Means of both sides for each task, (draws, 2), in the same unit.
    """
    both = np.mean(parts, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return both[:, 0] / both[:, 1]


def interval(draws: np.ndarray) -> Interval | None:
    """The middle 95 % of draws; None if one is not finite, as with few samples and hardly a right answer."""
    if not np.isfinite(draws).all():
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
