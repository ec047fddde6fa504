"""TAP's robust vision transformer by name for timm: tap_rvt_base_plus.

Papers: https://arxiv.org/abs/2303.11126 (TAP and ADL), https://arxiv.org/abs/2105.07926 (RVT). State dicts have the
released names, so that a released checkpoint loads, from a file, as nothing is downloaded:

timm.create_model("tap_rvt_base_plus", checkpoint_path="tapadl_rvt_base.pth.tar")
timm.create_model("tap_rvt_base_plus", pretrained=True, pretrained_cfg_overlay={"file": PATH}, img_size=(384, 512))

The second way also takes `img_size`, `in_chans` and `num_classes` that are not those of the checkpoint. Of a checkpoint
with two sets of weights, timm reads the averaged ones; the other set is had by giving in place of "file" "state_dict":
timm.models.load_state_dict(PATH, use_ema=False).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from vltok.methods.tap.pooling import TokenAwareAveragePooling
from vltok.models.tap_layers import TapBackbone, check_settings, check_size, released_weights
from vltok.models.weights import check_weights
from vltok.tokens import Grid

NAME = "tap_rvt_base_plus"
STEM_WIDTH = 32
default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "input_size": (3, 224, 224),
            "min_input_size": (3, 15, 15),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj.0",
            "classifier": "head",
            "license": "mit",
            "origin_url": "https://github.com/guoyongcs/TAPADL",
        }
    }
)


class ScaledAttention(nn.Module):
    """Self-attention whose scores may be scaled by learned numbers in 0..1, one for each pair of positions.

    Probabilities, (B, heads, N, N), go through `attn_drop`, where they can be seen.

    Args:
        dim: Width, C.
        num_heads: Attention heads; divides `dim`.
        grid: The grid, (H, W), that the learned numbers are made for; None leaves them out. For other grids they are
            resized bilinearly, over the positions of queries and of keys.
        attn_drop: Dropout of probabilities, in [0, 1].
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid | None = None, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.grid = grid
        if grid is None:
            self.register_parameter("att_mask", None)
        else:
            count = grid[0] * grid[1]
            self.att_mask = nn.Parameter(torch.empty(num_heads, count, count))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens row by row, (B, H * W, C), and (H, W) -> (B, H * W, C)."""
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        scores = self.scale * query @ key.mT  # (B, heads, N, N)
        if self.att_mask is not None:
            scores = scores * resize_mask(self.att_mask, self.grid, grid).sigmoid()
        attention = self.attn_drop(scores.softmax(-1))
        return self.proj((attention @ value).transpose(1, 2).flatten(2))


class ConvMlp(nn.Module):
    """An MLP by 1 x 1 convolutions with batch norms, between which neighbours on the grid mix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        x = x.mT.unflatten(2, grid)  # (B, C, H, W)
        x = F.gelu(self.bn1(self.fc1(x)))
        x = F.gelu(self.bn2(self.dwconv(x)))
        return self.bn3(self.fc2(x)).flatten(2).mT


class TapRvtBlock(nn.Module):
    """Attention among tokens that are pooled first, then an MLP by convolutions.

    Args:
        dim: Width, C.
        num_heads: Attention heads; divides `dim`.
        mlp_ratio: Width inside the MLP, in widths of the block.
        num_scales: Scales of the pooling, at least 1.
        grid: As for `ScaledAttention`.
        attn_drop: Dropout of probabilities, in [0, 1].
        drop_path: Chance that a sample skips a branch in training, in 0..1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_scales: int = 4,
        grid: Grid | None = None,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ScaledAttention(dim, num_heads, grid, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.dilation_predictor = TokenAwareAveragePooling(dim, num_scales)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens row by row, (B, H * W, C), and (H, W) -> (B, H * W, C)."""
        x = x + self.drop_path(self.attn(self.norm1(self.dilation_predictor(x, grid)), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class TapRvt(TapBackbone):
    """Patches by convolutions, then blocks of attention on a grid of stride 16, without [CLS] or position embeddings.

    Any picture whose sides are at least 15 pixels will do; a side of n pixels makes (n + 1) // 16 tokens, and the
    released convolutions leave out what is over. Levels, for features: the blocks; `features_only` gives four of them,
    evenly spaced.

    Differs from the released code: pictures of other sizes get the learned scales of attention by resizing, where there
    smaller ones get those of other positions and larger ones fail; and the rate of stochastic depth reaches
    `drop_path_rate` in the last block, where there it stays one step below.

    Args:
        img_size: Height and width of the pictures, or a square's side, that scales of attention are made for.
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: What the classifier sees: "avg" (the mean) or "" (each token).
        embed_dim: Width of the tokens.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Width inside the MLPs, in widths of the tokens.
        scaled_blocks: Blocks, the first ones, that have learned scales of attention.
        num_scales: Scales of the pooling, at least 1.
        drop_rate: Dropout before the classifier, in [0, 1].
        attn_drop_rate: Dropout of attention, in [0, 1].
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.

    Raises:
        ValueError: If a setting is out of range.
    """

    pools = ("avg", "")
    min_size = 15

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        scaled_blocks: int = 5,
        num_scales: int = 4,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_settings(drop_path_rate, embed_dim, num_heads, depth=depth, num_scales=num_scales)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_size(self.img_size, self.min_size, "img_size")
        grid = tuple(_patches(side) for side in self.img_size)
        self.patch_embed = _PatchEmbed(in_chans, embed_dim)
        blocks = [
            TapRvtBlock(
                embed_dim, num_heads, mlp_ratio, num_scales, grid if i < scaled_blocks else None, attn_drop_rate, rate
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        self.transformers = nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList(blocks)})])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        levels = [(embed_dim, 16, f"transformers.0.blocks.{i}") for i in range(depth)]
        self._finish_setup(in_chans, num_classes, global_pool, drop_rate, levels)
        for mask in self._masks():
            trunc_normal_(mask, std=0.02, a=-0.02, b=0.02)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first one first."""
        return self.transformers[0]["blocks"]

    def token_attentions(self) -> list[nn.Module]:
        return [block.attn for block in self.blocks]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: learned scales of attention."""
        return {name for name, _ in self.named_parameters() if name.endswith("att_mask")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters by depth, for layer-wise learning rates; `coarse` makes blocks one group."""
        block = r"^transformers" if coarse else r"^transformers\.0\.blocks\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(block, None), (r"^norm", (99999,))]}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean(1) if self.global_pool == "avg" else x
        x = self.head_drop(self.norm(x))
        return x if pre_logits else self.head(x)

    def _levels(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, Grid]]:
        x = self.patch_embed(x)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).mT  # (B, N, C)
        for block in self.blocks:
            x = self._run(block, x, grid)
            yield x, grid

    def _cut(self, count: int) -> None:
        self.transformers[0]["blocks"] = self.blocks[:count]

    def _masks(self) -> list[nn.Parameter]:
        return [block.attn.att_mask for block in self.blocks if block.attn.att_mask is not None]


class _PatchEmbed(nn.Module):
    """Convolutions and a pooling that make each 16 x 16 pixels a token."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, STEM_WIDTH, 7, stride=2, padding=2),
            nn.BatchNorm2d(STEM_WIDTH),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(STEM_WIDTH, dim, 4, stride=4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def resize_mask(mask: torch.Tensor, made_for: Grid, grid: Grid) -> torch.Tensor:
    """Resize numbers for pairs of positions, (heads, N, N), from one grid to another, bilinearly."""
    if made_for == grid:
        return mask
    for _ in range(2):  # over keys, then over queries
        mask = F.interpolate(mask.unflatten(2, made_for), grid, mode="bilinear").flatten(2).mT
    return mask


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: TapRvt) -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint, and fit them to pictures of another size, by resizing scales of attention.

    Args:
        state_dict: Weights under the released names, or a training checkpoint that holds them.
        model: What they are for.

    Returns:
        The weights. Scales that are not of a square picture stay as they are.
    """
    weights = released_weights(state_dict)
    for name, module in model.named_modules():
        mask = weights.get(f"{name}.att_mask")
        if isinstance(module, ScaledAttention) and module.grid is not None and mask is not None:
            side = math.isqrt(mask.shape[-1])
            if side**2 == mask.shape[-1] and mask.shape != module.att_mask.shape:
                weights[f"{name}.att_mask"] = resize_mask(mask, (side, side), module.grid)
    return weights


@register_model
def tap_rvt_base_plus(pretrained: bool = False, **kwargs: Any) -> TapRvt:
    """RVT-B-Plus with TAP, 89.4 M parameters as released: published top-1 83.1, mCE 44.7."""
    if pretrained:
        check_weights(NAME, kwargs)
    last = kwargs.get("depth", 12) - 1
    return build_model_with_cfg(
        TapRvt,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(sorted({last * i // 4 for i in (1, 2, 3, 4)})), "feature_cls": "getter"},
        **kwargs,
    )


def _patches(side: int) -> int:
    """Tokens along a side of so many pixels: what the convolutions make of it."""
    return (side + 1) // 16
