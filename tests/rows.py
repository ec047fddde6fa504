"""Marks that give a test of the contract other pairs than all."""

from __future__ import annotations

import pytest
from matrix import BRINGING_WEIGHTS, PAIRS, REFUSED, SELECTING, Pair, one_of_each, parameters


def _only(pairs: dict[str, Pair]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", parameters(pairs), indirect=True)


only_pruning = _only(SELECTING)
only_trained = _only(BRINGING_WEIGHTS)
refused = _only(REFUSED)
# For what takes long and hangs on the engine alone: every family and every method once.
few = _only(one_of_each(PAIRS))
few_pruning = _only(one_of_each(SELECTING))
