"""Marks that give a test of the contract other pairs than all."""

from __future__ import annotations

import pytest
from matrix import BRINGING_WEIGHTS, DROPPING, PAIRS, REFUSED, SELECTING, WEIGHTLESS, Pair, one_of_each, parameters


def only(pairs: dict[str, Pair]) -> pytest.MarkDecorator:
    """Run a test on these pairs alone."""
    return pytest.mark.parametrize("pair", parameters(pairs), indirect=True)


# Further families also with a method that drops inside the decoder, which much hangs on.
dropping_too = only(PAIRS | DROPPING)
# What is compared with the whole conversation told anew, or with another question.
whatever_is_asked_dropping_too = only(
    {name: pair for name, pair in PAIRS.items() if not pair.reads_question} | DROPPING
)
only_pruning_dropping_too = only(SELECTING | DROPPING)
only_pruning = only(SELECTING)
only_trained = only(BRINGING_WEIGHTS)
only_weightless = only(WEIGHTLESS)
refused = only(REFUSED)
# For what takes long and hangs on the engine alone: every family and every method once.
few = only(one_of_each(PAIRS))
few_pruning = only(one_of_each(SELECTING))
