"""From errors and predictions to the published scores.

Paper: Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from eval.robustness.corruptions import CORRUPTIONS, SEVERITIES
from eval.robustness.published import ALEXNET_ERRORS, ALEXNET_FLIP_RATES

Errors = Mapping[str, Mapping[int, float]]  # by corruption and severity, shares


def corruption_scores(errors: Errors) -> dict[str, float | None]:
    """Summarise the errors of one model.

    Args:
        errors: Top-1 errors as shares, by corruption and severity.

    Returns:
        "mean_error": the mean over corruptions of the mean over severities; None without corruptions.
        "mce": the mean over the 15 corruptions of the error summed over the five severities, divided by AlexNet's; None
        unless all 75 are there, as the score is defined by them.
    """
    means = {name: statistics.fmean(by_severity.values()) for name, by_severity in errors.items()}
    is_complete = set(means) == set(CORRUPTIONS) and all(set(each) == set(SEVERITIES) for each in errors.values())
    return {
        "mean_error": statistics.fmean(means.values()) if means else None,
        "mce": statistics.fmean(means[name] / ALEXNET_ERRORS[name] for name in means) if is_complete else None,
    }


def is_noise(perturbation: str) -> bool:
    """Whether the frames of a perturbation are independent draws: they are then compared with the first frame."""
    return "noise" in perturbation


def flip_share(predictions: Sequence[int], compare_with_first: bool) -> float:
    """Share of the frames of one sequence, all but the first, whose answer isn't that of the frame it is compared with.

    Args:
        predictions: Answer for each frame, (T,), T at least 2.
        compare_with_first: Compare with the first frame, as for noise, instead of with the one before.
    """
    answers = np.asarray(predictions)
    reference = answers[:1] if compare_with_first else answers[:-1]
    return float((answers[1:] != reference).mean())


def flip_score(rates: Mapping[str, float]) -> float | None:
    """mFR: the mean of the ten perturbations' flip rates, each divided by AlexNet's; None if one of them is missing."""
    if not set(ALEXNET_FLIP_RATES) <= set(rates):
        return None
    return statistics.fmean(rates[name] / rate for name, rate in ALEXNET_FLIP_RATES.items())
