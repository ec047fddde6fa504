"""Softmax-free attention: a Gaussian kernel that factors through landmarks, so that time and memory are linear.

Papers: https://arxiv.org/abs/2110.11945 (SOFT, NeurIPS 2021), https://arxiv.org/abs/2207.03341 (SOFT-Norm, IJCV 2024).
Differs from the released code, unless `parity=True`: the inverse is checked and, where it is not one, solved; no sample
depends on another; rows and columns that the ratio leaves over get landmarks too. Prefix tokens are an addition.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from vltok.checks import check_choice, check_integer
from vltok.errors import CheckpointError
from vltok.kernels.depthwise import depthwise_conv2d
from vltok.kernels.gaussian import full_precision, gaussian_kernel
from vltok.kernels.gaussian_mix import BACKENDS, gaussian_mix
from vltok.methods.soft.inverse import RIDGE, STEPS, kernel_inverse, released_inverse
from vltok.methods.weights import load_weights, weights_around
from vltok.tokens import Grid


class HeadConv2d(nn.Conv2d):
    """A depthwise convolution over heads, (B, heads * d, H, W) to the same: the d channels of a head share a kernel."""

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        super().__init__(num_heads, num_heads, kernel_size, padding=kernel_size // 2, groups=num_heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, self.weight.repeat_interleave(x.shape[1] // self.groups, 0))


class GaussianKernel(nn.Module):
    """What stands between the projections: landmarks, kernels and the convolution of the values, by released names."""

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        normalize: bool,
        newton_iters: int,
        num_prefix_tokens: int,
        backend: str,
        parity: bool,
    ) -> None:
        super().__init__()
        self.ratio = ratio
        self.normalize = normalize
        self.newton_iters = newton_iters
        self.num_prefix_tokens = num_prefix_tokens
        self.backend = backend
        self.parity = parity
        self.Qlandmark_op = nn.Conv2d(head_dim, head_dim, ratio, stride=ratio, bias=False)
        self.Qnorm_act = nn.Sequential(nn.LayerNorm(head_dim), nn.GELU())
        self.conv = HeadConv2d(num_heads, conv_size)

    def forward(self, query: torch.Tensor, value: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Attend: query and value (B, heads, N, d), query serving as key too -> (B, heads, N, d), float32."""
        with full_precision(query):
            scale, prefix = query.shape[-1] ** -0.25, self.num_prefix_tokens
            wide = torch.promote_types(query.dtype, torch.float32)
            query = query.to(wide).contiguous()
            landmarks = self._condense(query, grid, scale).to(wide)
            # Kernels see differences, products see less rounding. Prefix tokens may be long and would pull it away.
            center = landmarks.mean(2, keepdim=True).detach()
            query = torch.add(-center, query, alpha=scale)
            landmarks = torch.cat([landmarks - center, query[:, :, :prefix]], 2)
            weight = self._inverse(gaussian_kernel(landmarks, num_exact=prefix))  # (B, heads, M, M)
            attended = gaussian_mix(query, landmarks, value.to(wide), weight, prefix, self.backend)
            return attended + self._convolve(value, grid)

    def landmarks(self, query: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """Landmarks of `scale` times the queries: those of the regions, then prefix tokens, (B, heads, M, d)."""
        return torch.cat([self._condense(query, grid, scale), query[:, :, : self.num_prefix_tokens] * scale], 2)

    def _condense(self, query: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """Condense `scale` times the queries of each ratio x ratio region: (B, heads, N, d) -> (B, heads, M, d)."""
        cells = query[:, :, self.num_prefix_tokens :].flatten(0, 1).unflatten(1, grid)  # (B * heads, H, W, d)
        cells = cells.to(self.Qlandmark_op.weight.dtype)
        if torch.compiler.is_compiling():
            rows = self._condense_regions(cells, grid)
        else:
            for axis, side in enumerate(grid, 1) if not self.parity else ():
                if side % self.ratio:
                    cells = cells.index_select(axis, self._whole(side, cells.device))
            rows = self.Qlandmark_op(cells.movedim(-1, 1)).flatten(2).mT  # channels last in memory
        return self.Qnorm_act(rows * scale).unflatten(0, query.shape[:2])

    def _condense_regions(self, cells: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Convolve region by region, (B * heads, H, W, d) -> (B * heads, M, d), in one graph for all grids.

        Slower than on whole maps; but of a map whose sides are unknown the compiler can't order the strides.
        """
        ratio, (down, across) = self.ratio, (self._count(side) for side in grid)
        for axis, side in enumerate(grid, 1):
            cells = cells.index_select(axis, self._whole(side, cells.device))
        regions = cells.unflatten(2, (across, ratio)).unflatten(1, (down, ratio)).permute(0, 1, 3, 5, 2, 4)
        rows = self.Qlandmark_op(regions.reshape(-1, cells.shape[-1], ratio, ratio))
        return rows.reshape(cells.shape[0], down * across, cells.shape[-1])

    def _count(self, side: int) -> int:
        """Regions along a side."""
        return side // self.ratio if self.parity else (side + self.ratio - 1) // self.ratio

    def _whole(self, side: int, device: torch.device) -> torch.Tensor:
        """Rows, or columns, that make whole regions: the last one again and again, or fewer with `parity`."""
        return torch.arange(self._count(side) * self.ratio, device=device).clamp(max=side - 1)

    def _inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        ridge = 0.0 if self.normalize else RIDGE
        inverse = (released_inverse if self.parity else kernel_inverse)(kernel, self.newton_iters, ridge)
        if not self.normalize:
            return inverse
        scale = kernel.sum(-1).rsqrt()
        return scale.unsqueeze(-1) * inverse * scale.unsqueeze(-2)

    def _convolve(self, value: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Convolve values on the grid: (B, heads, N, d) -> (B, heads, N, d); prefix tokens get nothing."""
        rows = value.transpose(1, 2).flatten(2)[:, self.num_prefix_tokens :]  # (B, H * W, C)
        image = rows.unflatten(1, grid).permute(0, 3, 1, 2)  # channels last in memory, as convolutions like it
        rows = self.conv(image.to(self.conv.weight.dtype)).flatten(2).mT
        if self.num_prefix_tokens:
            rows = F.pad(rows, (0, 0, self.num_prefix_tokens, 0))
        return rows.unflatten(2, (value.shape[1], -1)).transpose(1, 2)


class SoftmaxFreeAttention(nn.Module):
    """Self-attention with linear cost: SOFT, or SOFT-Norm with `normalize`.

    Queries and keys are one projection. Landmarks are queries condensed over `ratio` x `ratio` regions of the grid, and
    prefix tokens as they are. Kernels and their inverse are computed in float32 whatever the dtype of the module. State
    dicts have the released names.

    Args:
        dim: Width, C.
        num_heads: Attention heads; must divide `dim`.
        ratio: Side of the region that becomes one landmark; at most the shorter side of the grid. Released are 8, 4, 2.
        conv_size: Side of the convolution of the values, odd. Released are 9, 5, 3 for those ratios.
        normalize: Scale the inverse by the landmarks' row sums, which generalises better (SOFT-Norm).
        newton_iters: Newton steps for the inverse. What they leave unsolved is solved in float64.
        num_prefix_tokens: Tokens before those of the grid, such as [CLS] and registers.
        backend: What computes the kernel products, see `vltok.kernels.gaussian_mix.gaussian_mix`.
        parity: Compute what the released code computes, for its checkpoints: the unchecked inverse, with `normalize`
            the one whose start depends on the whole batch; no landmarks for rows and columns that `ratio` leaves over.

    Raises:
        TypeError, ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        normalize: bool = True,
        newton_iters: int = STEPS,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        parity: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "num_heads": num_heads, "ratio": ratio, "conv_size": conv_size}.items():
            check_integer(name, value, least=1)
        check_integer("newton_iters", newton_iters, least=1)
        check_integer("num_prefix_tokens", num_prefix_tokens, least=0)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        if conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, so that the convolution keeps the grid; got {conv_size}")
        check_choice("backend", backend, BACKENDS)
        self.dim = dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.W_q = nn.Linear(dim, dim)
        self.W_v = nn.Linear(dim, dim)
        self.attn = GaussianKernel(
            dim // num_heads,
            num_heads,
            ratio,
            conv_size,
            normalize,
            newton_iters,
            num_prefix_tokens,
            backend,
            parity,
        )
        self.ff = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Attend.

        Args:
            x: Tokens, (B, N, C): prefix tokens, then the grid's row by row; N = num_prefix_tokens + H * W.
            grid: Height and width of the grid, (H, W).

        Returns:
            (B, N, C), in the dtype that a linear layer gives.

        Raises:
            ValueError: If the tokens don't form the grid, or the grid is smaller than the ratio.
        """
        self._check(x, grid)
        query, value = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.W_q, self.W_v))
        attended = self.attn(query, value, grid)  # (B, heads, N, d)
        return self.ff(attended.transpose(1, 2).flatten(2).to(value.dtype))

    def _check(self, x: torch.Tensor, grid: Grid) -> None:
        height, width = grid
        ratio, prefix = self.attn.ratio, self.num_prefix_tokens
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, N, {self.dim}), got {tuple(x.shape)}")
        if x.shape[1] != prefix + height * width:
            raise ValueError(
                f"{x.shape[1]} tokens are not {prefix} prefix tokens and a grid of {height} x {width} = "
                f"{height * width}; pass the grid that the tokens form, and num_prefix_tokens at construction"
            )
        if ratio > min(height, width):
            raise ValueError(
                f"ratio={ratio} is larger than the grid of {height} x {width}; use a ratio of at most "
                f"{min(height, width)}, or a larger picture"
            )

    def extra_repr(self) -> str:
        inner = self.attn
        names = ("ratio", "normalize", "newton_iters", "num_prefix_tokens", "backend", "parity")
        return ", ".join([f"num_heads={self.num_heads}"] + [f"{name}={getattr(inner, name)!r}" for name in names])

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        normalize: bool = True,
        newton_iters: int = STEPS,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        parity: bool = True,
    ) -> SoftmaxFreeAttention:
        """Build the attention that released weights belong to, by default computing what they were trained with.

        Args:
            state_dict: Weights with the official names, bare or behind a common prefix ("block1.0.att.mha."), of one
                attention. Sizes, dtype and device are read from them.
            normalize: Whether they are of a -Norm model, which weights don't tell.
            newton_iters: As for the constructor.
            num_prefix_tokens: As for the constructor.
            backend: As for the constructor.
            parity: As for the constructor.

        Raises:
            CheckpointError: If weights are missing, unexpected or of the wrong shape; the message lists them.
        """
        anchor = "W_q.weight"
        own = weights_around(state_dict, anchor)

        def size(name: str, dims: int, axis: int, default: int) -> int:  # the default is to name what is missing
            return own[name].shape[axis] if name in own and own[name].dim() == dims else default

        dim, heads = size(anchor, 2, 1, 64), size("attn.conv.weight", 4, 0, 2)
        ratio, conv_size = size("attn.Qlandmark_op.weight", 4, -1, 8), size("attn.conv.weight", 4, -1, 9)
        settings = (normalize, newton_iters, num_prefix_tokens, backend, parity)
        if min(dim, heads, ratio, conv_size) < 1 or dim % heads or conv_size % 2 == 0:
            raise CheckpointError(
                f"these weights are of no softmax-free attention: width {dim}, {heads} heads, ratio {ratio}, "
                f"convolution of {conv_size}; heads must divide the width, and the convolution be odd"
            )
        with torch.device("meta"):
            attention = cls(dim, heads, ratio, conv_size, *settings)
        load_weights(attention, own, "a softmax-free attention")
        return attention
