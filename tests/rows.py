"""Marks that give a test other pairs than all."""

from __future__ import annotations

import matrix
import pytest

_QUICK = matrix.quick(matrix.PAIRS)
only_pruning = pytest.mark.parametrize("pair", matrix.parameters(matrix.SELECTING), indirect=True)
only_trained = pytest.mark.parametrize("pair", matrix.parameters(matrix.BRINGING_WEIGHTS), indirect=True)
refused = pytest.mark.parametrize("pair", matrix.parameters(matrix.REFUSED), indirect=True)
# For what takes long and hangs on the engine alone.
few = pytest.mark.parametrize("pair", matrix.parameters({name: matrix.PAIRS[name] for name in _QUICK}), indirect=True)
few_pruning = pytest.mark.parametrize(
    "pair",
    matrix.parameters(
        {name: pair for name, pair in matrix.SELECTING.items() if name in matrix.quick(matrix.SELECTING)}
    ),
    indirect=True,
)
