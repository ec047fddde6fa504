from __future__ import annotations

import matrix
import pytest
import tiny
import torch


@pytest.fixture(params=matrix.parameters(matrix.PAIRS))
def pair(request) -> matrix.Pair:
    return request.param


@pytest.fixture
def model(pair) -> torch.nn.Module:
    """A model that tests may attach to but must leave as they found it."""
    return tiny.shared_model(pair.family)
