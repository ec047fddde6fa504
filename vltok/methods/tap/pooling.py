"""Token-aware average pooling: each token draws on its neighbourhood, at scales of its own choice.

Paper: https://arxiv.org/abs/2303.11126 (TAP). Equal to the released code, on grids that need not be square. Differs
from it in what it holds: no neighbourhood is unfolded, and one pooled map at a time is enough, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from vltok.autograd import autocast_off, gradients_to_differentiate, runs_eagerly
from vltok.checks import check_integer, is_number
from vltok.tokens import Grid

CHUNK = 2**18  # numbers of feature maps that a CPU thread pools at a time, as many as stay in a core's cache
MARGIN = 8.0  # of the token itself before the other scales, where pooling starts as the identity


class TokenAwareAveragePooling(nn.Module):
    """Mix each token with means over 3 x 3 tokens that are 1, 2, ... apart, by weights that a small network predicts.

    Means count tokens beyond the border as 0. Prefix tokens pass as they are. Parameters have the released names.

    Args:
        dim: Width, C.
        num_scales: Scales, K, at least 1: the token itself and K - 1 means.
        num_prefix_tokens: Tokens before those of the grid, such as [CLS] and registers.
        temperature: Of the softmax over scales, above 0.
        identity_init: Start near the identity, for models that are trained already: each token then takes at most
            (K - 1) / e^8 of its value from elsewhere, 0.1 % for K = 4, and the weights are the same everywhere. By
            default they start as published.

    Raises:
        TypeError, ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_scales: int = 4,
        num_prefix_tokens: int = 0,
        temperature: float = 1.0,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, 1)
        check_integer("num_scales", num_scales, 1)
        check_integer("num_prefix_tokens", num_prefix_tokens, 0)
        if not is_number(temperature):
            raise TypeError(f"temperature must be a number, got {temperature!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        self.dim = dim
        self.num_scales = num_scales
        self.num_prefix_tokens = num_prefix_tokens
        self.temperature = float(temperature)
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )
        if identity_init:
            self._start_as_identity()

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        """Let the norm give 1 everywhere, of which the last layer makes a margin for the token itself."""
        _, norm, last = self.proj
        norm.weight.zero_()
        norm.bias.fill_(1)
        last.weight.zero_()
        last.weight[0, :, 1, 1] = MARGIN * self.temperature / self.num_scales

    def forward(self, x: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Pool.

        Args:
            x: Tokens, (B, N, C): prefix tokens, then the grid's row by row; or feature maps, (B, C, H, W).
            grid: Height and width of the grid, (H, W). By default that of the feature maps, or a square of tokens.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: If the shape is another, or the tokens don't form the grid, or no square without one.
        """
        if x.dim() == 4:
            if x.shape[1] != self.dim:
                raise ValueError(f"feature maps must be (B, {self.dim}, H, W), got {tuple(x.shape)}")
            if grid is not None and tuple(grid) != x.shape[2:]:
                raise ValueError(f"feature maps have a grid of {x.shape[2]} x {x.shape[3]}; leave out grid={grid}")
            return self._pool(x.movedim(1, -1)).movedim(-1, 1)
        height, width = self._check(x, grid)
        patches = x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x
        pooled = self._pool(patches.unflatten(1, (height, width))).flatten(1, 2)
        return torch.cat([x[:, : self.num_prefix_tokens], pooled], 1) if self.num_prefix_tokens else pooled

    def scale_weights(self, maps: torch.Tensor) -> torch.Tensor:
        """How much of each scale every token takes: (B, H, W, C) -> (B, H, W, K), adding up to 1."""
        scores = self.proj(maps.movedim(-1, 1)).movedim(1, -1)
        return (scores / self.temperature).softmax(-1)

    def _pool(self, maps: torch.Tensor) -> torch.Tensor:
        weights = self.scale_weights(maps).to(maps.dtype)
        return _MixScales.apply(maps, weights) if runs_eagerly() else mix_scales(maps, weights)

    def _check(self, x: torch.Tensor, grid: Grid | None) -> Grid:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, N, {self.dim}) or (B, {self.dim}, H, W), got {tuple(x.shape)}")
        patches = x.shape[1] - self.num_prefix_tokens
        if grid is None:
            side = math.isqrt(max(patches, 0))
            if patches < 1 or side * side != patches:
                raise ValueError(
                    f"{x.shape[1]} tokens, {self.num_prefix_tokens} of them prefix tokens, form no square; pass the "
                    "grid that they form, (height, width)"
                )
            return side, side
        if grid[0] * grid[1] != patches:
            raise ValueError(
                f"{x.shape[1]} tokens are not {self.num_prefix_tokens} prefix tokens and a grid of {grid[0]} x "
                f"{grid[1]} = {grid[0] * grid[1]}; pass the grid that the tokens form"
            )
        return grid

    def extra_repr(self) -> str:
        return (
            f"num_scales={self.num_scales}, num_prefix_tokens={self.num_prefix_tokens}, temperature={self.temperature}"
        )


def mix_scales(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of the pooled maps, weighted token by token: (B, H, W, C), (B, H, W, K) -> (B, H, W, C)."""
    out = maps * weights[..., :1]
    for scale in range(1, weights.shape[-1]):
        out = out.addcmul(dilated_mean(maps, scale), weights[..., scale : scale + 1])
    return out


def dilated_mean(maps: torch.Tensor, dilation: int) -> torch.Tensor:
    """Mean over 3 x 3 tokens, so far apart, those beyond the border being 0: (B, H, W, C) to the same."""
    channels = maps.shape[-1]
    kernel = maps.new_full((1, 1, 3, 3), 1 / 9).expand(channels, 1, 3, 3)
    image = maps.movedim(-1, 1)  # channels last in memory
    with autocast_off(maps):
        mean = F.conv2d(image, kernel, padding=dilation, dilation=dilation, groups=channels)
    return mean.movedim(1, -1)


class _MixScales(torch.autograd.Function):
    """`mix_scales`, some samples at a time, that holds its inputs and no mean.

    Beside autograd's own way it takes about 0.5 to 0.8 of the time and 0.3 of the memory, forward and backward on a
    CPU.
    """

    @staticmethod
    def forward(ctx, maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(maps, weights)
        out = torch.empty_like(maps, memory_format=torch.contiguous_format)
        for chosen in _chunks(maps):
            part = maps[chosen].contiguous()
            torch.mul(part, weights[chosen, ..., :1], out=out[chosen])
            for scale in range(1, weights.shape[-1]):
                out[chosen].addcmul_(dilated_mean(part, scale), weights[chosen, ..., scale : scale + 1])
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A mean is its own transpose: the gradient of the maps is the sum of the pooled weighted gradients."""
        maps, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_to_differentiate(mix_scales, (maps, weights), grad)
        grad_maps = torch.empty_like(maps, memory_format=torch.contiguous_format)
        grad_weights = torch.empty_like(weights)
        for chosen in _chunks(maps):
            part, given = maps[chosen].contiguous(), grad[chosen].contiguous()
            torch.mul(given, weights[chosen, ..., :1], out=grad_maps[chosen])
            grad_weights[chosen, ..., 0] = (part * given).sum(-1)
            for scale in range(1, weights.shape[-1]):
                grad_weights[chosen, ..., scale] = dilated_mean(part, scale).mul_(given).sum(-1)
                weighted = given * weights[chosen, ..., scale : scale + 1]
                grad_maps[chosen] += dilated_mean(weighted, scale)
        return grad_maps, grad_weights


def _chunks(maps: torch.Tensor) -> Iterator[slice]:
    """Samples that are pooled together."""
    per_sample = max(1, maps[:1].numel())
    on_cpu = maps.device.type == "cpu"
    size = max(1, CHUNK * torch.get_num_threads() // per_sample if on_cpu else maps.shape[0])
    for first in range(0, maps.shape[0], size):
        yield slice(first, min(first + size, maps.shape[0]))
