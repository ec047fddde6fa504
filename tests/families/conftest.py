from __future__ import annotations

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=tiny.PRUNABLE, ids=lambda family: family.key)
def family(request) -> tiny.TinyFamily:
    return request.param


@pytest.fixture
def model(family) -> torch.nn.Module:
    return tiny.shared_model(family)
