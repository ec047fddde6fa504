"""What SOFT's backbones are built of: patch embeddings by convolution, and the blocks of both kinds of attention.

Papers: https://arxiv.org/abs/2110.11945, https://arxiv.org/abs/2207.03341. Attributes have the released names. Differs
from the released code: `drop_path` leaves out whole branches of a sample (stochastic depth), where the released blocks
drop single numbers at that rate. That matters in training only.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import nn
from torch.nn import functional as F

from vltok.methods.soft.attention import SoftmaxFreeAttention
from vltok.tokens import Grid

STEM_WIDTH = 32


class PatchEmbed(nn.Module):
    """Make each 2 x 2 cells of a map one, or each 4 x 4 pixels of a picture; what an edge leaves over makes one too.

    Args:
        in_chans: Channels of the map.
        dim: Channels of the result.
        is_stem: Whether it is the three convolutions that begin the network, rather than one.
    """

    def __init__(self, in_chans: int, dim: int, is_stem: bool = False) -> None:
        super().__init__()
        widths = [(in_chans, STEM_WIDTH, 2), (STEM_WIDTH, STEM_WIDTH, 1), (STEM_WIDTH, dim, 2)]
        layers: list[nn.Module] = []
        for before, after, stride in widths if is_stem else [(in_chans, dim, 2)]:
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / 2, W / 2), or H / 4 and W / 4 for the stem, rounded up."""
        return self.proj(x)


class SoftLayer(nn.Module):
    """Softmax-free attention and an MLP, each with a norm after the sum with what went in."""

    def __init__(self, attention: SoftmaxFreeAttention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        dim, hidden = attention.dim, int(attention.dim * mlp_ratio)
        self.mha = attention
        self.norm1 = nn.LayerNorm(dim)
        self.ff1 = nn.Linear(dim, hidden)
        self.ff2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        x = self.norm1(x + self.drop_path(self.mha(x, grid)))
        return self.norm2(x + self.drop_path(self.ff2(F.gelu(self.ff1(x), approximate="tanh"))))


class SoftBlock(nn.Module):
    """A `SoftLayer` under its released name.

    Args:
        attention: The attention; its width is that of the block.
        mlp_ratio: Width inside the MLP, in widths of the block.
        drop_path: Chance that a sample skips a branch in training, in 0..1.
    """

    def __init__(self, attention: SoftmaxFreeAttention, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.att = SoftLayer(attention, mlp_ratio, drop_path)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens row by row, (B, H * W, C), and (H, W) -> (B, H * W, C)."""
        return self.att(x, grid)


class SoftmaxAttention(nn.Module):
    """Ordinary self-attention, the projections named as released."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.q(x), *self.kv(x).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, C / heads)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SoftmaxBlock(nn.Module):
    """The block of a plain vision transformer, norms first.

    Args:
        dim: Width, C.
        num_heads: Attention heads; divides `dim`.
        mlp_ratio: Width inside the MLP, in widths of the block.
        drop_path: Chance that a sample skips a branch in training, in 0..1.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SoftmaxAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens, (B, N, C) -> (B, N, C); the grid is for blocks that need one."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
