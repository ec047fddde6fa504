"""From errors and answers to the published scores, and AlexNet's figures that these are divided by.

Paper: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
https://arxiv.org/abs/1903.12261. AlexNet's figures are of ImageNet's 1000 classes at 224 x 224; for other data they are
no more than weights, so that the unnormalised means are the figures to read there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

# Top-1 error on ImageNet-C, mean over the five severities.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Share of the frames of ImageNet-P whose top-1 answer changes.
ALEXNET_FLIP_RATES = {
    "gaussian_noise": 0.2365,
    "shot_noise": 0.3006,
    "motion_blur": 0.0930,
    "zoom_blur": 0.0594,
    "snow": 0.1193,
    "brightness": 0.0489,
    "translate": 0.1101,
    "rotate": 0.1310,
    "tilt": 0.0705,
    "scale": 0.2353,
}
CORRUPTIONS = tuple(ALEXNET_ERRORS)
SEVERITIES = (1, 2, 3, 4, 5)
By = Mapping[str, Mapping[int, float]]  # by corruption and severity, shares


def corruption_means(by: By) -> dict[str, float]:
    """Mean over the severities of each corruption."""
    return {name: statistics.fmean(values.values()) for name, values in by.items()}


def severity_means(by: By) -> dict[int, float]:
    """Mean over the corruptions of each severity."""
    severities = sorted({severity for values in by.values() for severity in values})
    return {severity: statistics.fmean(values[severity] for values in by.values()) for severity in severities}


def mean_corruption_error(errors: By) -> float | None:
    """mCE: the mean over the 15 corruptions of the error, summed over severities, divided by AlexNet's.

    None unless all 75 errors are there, as the score is defined by them.
    """
    if set(errors) != set(CORRUPTIONS) or any(set(each) != set(SEVERITIES) for each in errors.values()):
        return None
    means = corruption_means(errors)
    return statistics.fmean(means[name] / ALEXNET_ERRORS[name] for name in CORRUPTIONS)


def is_noise(perturbation: str) -> bool:
    """Whether the frames of a perturbation are independent draws: they are then compared with the first frame."""
    return "noise" in perturbation


def flip_share(answers: Sequence[int], compare_with_first: bool) -> float:
    """Share of the frames of one sequence, all but the first, whose answer isn't that of the frame it is compared with.

    Args:
        answers: Answer for each frame, (T,), T at least 2.
        compare_with_first: Compare with the first frame, as for noise, instead of with the one before.
    """
    found = np.asarray(answers)
    return float((found[1:] != (found[:1] if compare_with_first else found[:-1])).mean())


def mean_flip_rate(rates: Mapping[str, float]) -> float | None:
    """mFR: the mean of the ten perturbations' flip rates, each divided by AlexNet's; None if one of them is missing."""
    if not set(ALEXNET_FLIP_RATES) <= set(rates):
        return None
    return statistics.fmean(rates[name] / rate for name, rate in ALEXNET_FLIP_RATES.items())
