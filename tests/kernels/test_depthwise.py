"""depthwise_conv2d against torch's convolution, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vltok.kernels.depthwise import depthwise_conv2d


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("shape", [(1, 6, 9, 9), (2, 4, 5, 12), (1, 3, 1, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_equals_torchs_convolution_forward_and_backward(shape, size, channels_last):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(shape[1], 1, size, size, generator=rng, dtype=torch.float64, requires_grad=True)
    out = depthwise_conv2d(x, weight)
    expected = F.conv2d(x, weight, padding=size // 2, groups=shape[1])
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(shape, generator=rng, dtype=torch.float64)
    found = torch.autograd.grad(out, (x, weight), cotangent)
    for mine, wanted in zip(found, torch.autograd.grad(expected, (x, weight), cotangent), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_needs_are_not_made(needed):
    x, weight = torch.randn(1, 2, 6, 6, requires_grad=needed[0]), torch.randn(2, 1, 5, 5, requires_grad=needed[1])
    out = depthwise_conv2d(x, weight)
    assert out.requires_grad == any(needed)
    if any(needed):
        out.sum().backward()
        assert (x.grad is not None, weight.grad is not None) == needed
