"""A depthwise convolution that also trains fast on the CPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from vltok.kernels.transforms import is_transformed

FAST = 3  # columns of a kernel up to which oneDNN has fast code for its gradient


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve each channel with a kernel of its own, keeping the grid.

    On the CPU the gradient of a larger kernel is put together from those of strips that are 3 columns wide, which takes
    about a fifth of the time.

    Args:
        x: Feature maps, (B, C, H, W); channels last in memory is fastest.
        weight: Kernels, (C, 1, c, c), c odd.

    Returns:
        Feature maps, (B, C, H, W).
    """
    pad = weight.shape[-1] // 2
    if torch.compiler.is_compiling():
        # A copy rather than a view is held for the backward pass: of views whose sides are unknown, inductor can't
        # order the strides.
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)), weight, groups=weight.shape[0])
    is_slow = x.device.type == "cpu" and weight.shape[-1] > FAST and weight.requires_grad
    if is_slow and not is_transformed(x, weight):
        return _Depthwise.apply(x, weight)
    return F.conv2d(x, weight, padding=pad, groups=weight.shape[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        (channels, _, _, size), width = weight.shape, x.shape[-1]
        pad = size // 2
        grad = _channels_last(grad)  # here once, rather than for each strip
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=pad, groups=channels)
        if ctx.needs_input_grad[1]:
            padded = F.pad(x.movedim(1, -1), (0, 0, pad, pad, pad, pad)).movedim(-1, 1)  # stays channels last
            grad_weight = torch.empty_like(weight)
            for left in range(0, size, FAST):
                strip = grad_weight[..., left : left + FAST]
                seen = padded[..., left : left + width + strip.shape[-1] - 1]
                strip.copy_(conv2d_weight(seen, strip.shape, grad, groups=channels))
        return grad_x, grad_weight


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """Lay out maps as convolutions like it, also a single one, for which `contiguous` leaves other strides."""
    laid_out = torch.empty_like(x, memory_format=torch.channels_last)
    return x if x.stride() == laid_out.stride() else laid_out.copy_(x)
