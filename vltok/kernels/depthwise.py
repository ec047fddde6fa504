"""A depthwise convolution that also trains fast on the CPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

FAST = 3  # oneDNN has fast code for the gradient of weights up to this size


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve each channel with a kernel of its own, keeping the grid.

    On the CPU the gradient of a larger kernel is put together from those of 3 x 3 pieces of it, which takes about a
    third of the time.

    Args:
        x: Feature maps, (B, C, H, W); channels last in memory is fastest.
        weight: Kernels, (C, 1, c, c), c odd.

    Returns:
        Feature maps, (B, C, H, W).
    """
    if x.device.type == "cpu" and weight.shape[-1] > FAST and weight.requires_grad:
        return _Depthwise.apply(x, weight)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        (channels, _, size, _), (height, width) = weight.shape, x.shape[-2:]
        pad = size // 2
        grad = grad.contiguous(memory_format=torch.channels_last)  # here once, rather than in each piece
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, weight, grad, padding=pad, groups=channels)
        if ctx.needs_input_grad[1]:
            padded = F.pad(x.movedim(1, -1), (0, 0, pad, pad, pad, pad)).movedim(-1, 1)  # stays channels last
            grad_weight = torch.empty_like(weight)
            for top in range(0, size, FAST):
                for left in range(0, size, FAST):
                    piece = grad_weight[:, :, top : top + FAST, left : left + FAST]
                    rows, columns = piece.shape[-2:]
                    seen = padded[:, :, top : top + height + rows - 1, left : left + width + columns - 1]
                    piece.copy_(conv2d_weight(seen, piece.shape, grad, groups=channels))
        return grad_x, grad_weight
