"""The 15 corruptions of ImageNet-C at five severities, made by imagecorruptions-imaug, each from a seed of its own.

The strengths are those of the paper for ImageNet at 224 x 224. Blurs, noise and weather don't shrink with the picture:
at 32 x 32 they are far harsher than those of CIFAR-C, which has constants of its own.
"""

from collections.abc import Sequence
from importlib import metadata

import numpy as np

from eval.robustness.published import ALEXNET_ERRORS

CORRUPTIONS = tuple(ALEXNET_ERRORS)
SEVERITIES = (1, 2, 3, 4, 5)
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
    check_names([corruption], CORRUPTIONS, "corruption")
    check_names([severity], SEVERITIES, "severity")
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"corruptions need pictures of {MIN_SIDE} x {MIN_SIDE} or more, got {pixels.shape[1]} x {pixels.shape[0]}"
        )
    library = _library()
    state = np.random.get_state()
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


def package_version() -> str:
    """Name and version of what makes the corruptions.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    _library()
    return f"{PACKAGE} {metadata.version(PACKAGE)}"


def warm_up() -> None:
    """Compile what the library compiles on its first call, so that worker processes needn't do so once each."""
    corrupt(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8), "glass_blur", 1, 0)


def parse_corruptions(text: str) -> list[str]:
    """Read "all", "none" or "fog,snow"; in the order of `CORRUPTIONS`.

    Raises:
        ValueError: If there is no such corruption.
    """
    if text.strip() in ("all", "none"):
        return list(CORRUPTIONS) if text.strip() == "all" else []
    names = [name.strip() for name in text.split(",")]
    check_names(names, CORRUPTIONS, "corruption")
    return [name for name in CORRUPTIONS if name in names]


def parse_severities(text: str) -> list[int]:
    """Read "1,3,5"; ascending.

    Raises:
        ValueError: If one is not in 1..5.
    """
    numbers = [int(part) if part.strip().isdecimal() else part.strip() for part in text.split(",")]
    check_names(numbers, SEVERITIES, "severity")
    return sorted(set(numbers))


def corruption_cells(names: Sequence[str], severities: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Every corruption and severity by the name of its cell, such as "corruption/fog/3"."""
    return {f"corruption/{name}/{severity}": (name, severity) for name in names for severity in severities}


def check_names(given: Sequence[object], known: Sequence[object], what: str) -> None:
    """Raise a ValueError that names what is unknown, and all that is known."""
    for each in given:
        if each not in known:
            raise ValueError(f"there is no {what} {each!r}; there are {', '.join(map(str, known))}")


def start_worker(number: int) -> None:
    """Let a process that makes pictures use one thread: there is one process for every core already."""
    import cv2

    cv2.setNumThreads(0)


def _library():
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'corruptions are made by the package {PACKAGE}: pip install "vltok[robustness]"', name=error.name
        ) from error
    return imagecorruptions
