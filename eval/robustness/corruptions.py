"""The 15 corruptions of ImageNet-C at five severities, made by imagecorruptions-imaug, each from a seed of its own.

The strengths are those of the paper for ImageNet at 224 x 224. Blurs, noise and weather don't shrink with the picture:
at 32 x 32 they are far harsher than those of CIFAR-C, which has constants of its own.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from eval.robustness.scores import CORRUPTIONS, SEVERITIES

MIN_SIDE = 32  # pixels, the library's
PACKAGE = "imagecorruptions-imaug"
_TAKES_SEED = ("impulse_noise", "glass_blur")  # they draw from generators of their own, the others from NumPy's global


def corrupt(pixels: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    """Corrupt a picture, always alike for the same seed, whatever was drawn before.

    Args:
        pixels: (H, W, 3) or (H, W), uint8; both sides at least 32 pixels.
        corruption: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: 0 to 2**32 - 1.

    Returns:
        The corrupted picture, shape and dtype as before; of a grey one the first channel, as a mean would weaken noise.

    Raises:
        ModuleNotFoundError: If the library is not installed.
        ValueError: If the picture is too small, or there is no such corruption or severity.
    """
    chosen([corruption], CORRUPTIONS, "corruption")
    chosen([severity], SEVERITIES, "severity")
    if min(pixels.shape[:2]) < MIN_SIDE:
        size = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"corruptions need pictures of {MIN_SIDE} x {MIN_SIDE} or more, got {size}")
    library, state = _library(), np.random.get_state()
    np.random.seed(seed)
    try:
        extra = {"seed": seed} if corruption in _TAKES_SEED else {}
        corrupted = library.corrupt(np.ascontiguousarray(pixels), severity, corruption, **extra)
    finally:
        np.random.set_state(state)
    return np.array(corrupted if pixels.ndim == 3 else corrupted[..., 0])  # a copy: some can't be written to


def picture_seed(seed: int, index: int, corruption: str, severity: int) -> int:
    """The seed of one corruption of one picture, 0 to 2**32 - 1: it doesn't depend on batches, workers or order."""
    numbers = (seed, index, CORRUPTIONS.index(corruption), severity)
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def describe(corruption: str, severity: int, seed: int, of: str) -> dict[str, Any]:
    """All that decides what a corruption makes of a picture, as plain data; compiles what the library compiles."""
    if corruption == "glass_blur":  # so that worker processes needn't do so once each
        corrupt(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8), corruption, 1, 0)
    library = f"{_library().__name__} {metadata.version(PACKAGE)}"
    return {"name": corruption, "severity": severity, "seed": seed, "of": of, "library": library}


def parse_corruptions(text: str) -> list[str]:
    """Read "all", "none" or "fog,snow"; in the order of `CORRUPTIONS`."""
    named = {"all": list(CORRUPTIONS), "none": []}
    return named[text] if text in named else chosen(text.split(","), CORRUPTIONS, "corruption")


def parse_severities(text: str) -> list[int]:
    """Read "1,3,5"; ascending."""
    return chosen([int(part) if part.isdecimal() else part for part in text.split(",")], SEVERITIES, "severity")


def chosen(given: list[Any], known: tuple[Any, ...], what: str) -> list[Any]:
    """What is given, in the order of what is known; a ValueError names what is unknown."""
    if unknown := [each for each in given if each not in known]:
        raise ValueError(f"there is no {what} {unknown[0]!r}; there are {', '.join(map(str, known))}")
    return [each for each in known if each in given]


def _library():
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'corruptions are made by the package {PACKAGE}: pip install "vltok[robustness]"', name=error.name
        ) from error
    return imagecorruptions
