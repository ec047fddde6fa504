from __future__ import annotations

from collections.abc import Iterator

import matrix
import pytest
import tiny
import torch

import vltok


@pytest.fixture(params=matrix.parameters(matrix.PAIRS))
def pair(request) -> matrix.Pair:
    return request.param


@pytest.fixture
def model(pair) -> Iterator[torch.nn.Module]:
    """A model that tests may attach to but must leave as they found it; what a failed one left is taken off."""
    shared = tiny.shared_model(pair.family)
    yield shared
    vltok.remove(shared)
