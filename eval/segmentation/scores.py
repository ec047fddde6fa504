"""Intersection over union from counts of pixels."""

from collections.abc import Sequence

import torch

IGNORED = 255  # pixels of a mask that belong to no class


def confusion(predicted: torch.Tensor, mask: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count pixels by their class and by what was predicted.

    Args:
        predicted: Classes in 0..num_classes - 1, any shape, int64.
        mask: True classes, same shape, int64; pixels of value 255 are left out.
        num_classes: How many classes there are.

    Returns:
        (num_classes, num_classes) int64: row for the true class, column for the prediction.

    Raises:
        ValueError: If the mask has a value that is no class.
    """
    valid = mask != IGNORED
    mask, predicted = mask[valid], predicted[valid]
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) < num_classes:
        raise ValueError(
            f"a mask has values {int(mask.min())}..{int(mask.max())}, the model {num_classes} classes; values are 0 to "
            f"{num_classes - 1}, and {IGNORED} for pixels to leave out"
        )
    pairs = torch.bincount(mask * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def intersection_over_union(counts: torch.Tensor) -> list[float | None]:
    """IoU of each class from counts (classes, classes); None for one that is nowhere, neither true nor predicted."""
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return [int(hit) / int(all_) if all_ else None for hit, all_ in zip(hits, union, strict=True)]


def mean_iou(ious: Sequence[float | None]) -> float | None:
    """The mean over the classes that occur, None where none does."""
    known = [each for each in ious if each is not None]
    return sum(known) / len(known) if known else None
