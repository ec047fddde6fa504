"""TAP's fully attentional network by name for timm: tap_fan_base_16_p4_hybrid.

Papers: https://arxiv.org/abs/2303.11126 (TAP and ADL), https://arxiv.org/abs/2204.12451 (FAN). State dicts have the
released names, so that a released checkpoint loads, from a file, as nothing is downloaded:

timm.create_model("tap_fan_base_16_p4_hybrid", checkpoint_path="tapadl_fan_base.pth.tar")
timm.create_model("tap_fan_base_16_p4_hybrid", pretrained=True, pretrained_cfg_overlay={"file": PATH}, num_classes=10)

Of a checkpoint with two sets of weights, timm reads the averaged ones; for the other set give, in place of "file",
"state_dict": timm.models.load_state_dict(PATH, use_ema=False).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtStage
from timm.models.xcit import LPI, ClassAttentionBlock, PositionalEncodingFourier
from torch import nn
from torch.nn import functional as F

from vltok.methods.tap.pooling import TokenAwareAveragePooling
from vltok.models.tap_layers import TapBackbone, check_settings, released_weights
from vltok.models.weights import check_weights
from vltok.tokens import Grid

NAME = "tap_fan_base_16_p4_hybrid"
default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "input_size": (3, 224, 224),
            "min_input_size": (3, 16, 16),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.backbone.stem.0",
            "classifier": "head",
            "license": "mit",
            "origin_url": "https://github.com/guoyongcs/TAPADL",
        }
    }
)


class TokenAttention(nn.Module):
    """Self-attention among tokens. Probabilities, (B, heads, N, N), go through `attn_drop`, where they can be seen.

    Args:
        dim: Width, C.
        num_heads: Attention heads; divides `dim`.
        attn_drop: Dropout of probabilities, in [0, 1].
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        parts = (self.q(x), *self.kv(x).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attention = self.attn_drop((self.scale * query @ key.mT).softmax(-1))
        return self.proj((attention @ value).transpose(1, 2).flatten(2))


class ValueMlp(nn.Module):
    """An MLP between whose layers neighbours on the grid mix, in place of an activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = LPI(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x + self.gamma * self.dwconv(x, *grid))


class ChannelAttention(nn.Module):
    """FAN's channel processing: an MLP whose channels are weighted by what they have in common with their head.

    Args:
        dim: Width, C.
        num_heads: Heads; divides `dim`.
        hidden: Width inside the MLP.
        attn_drop: Dropout of the weights, in [0, 1].
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.mlp_v = ValueMlp(dim, hidden)
        self.norm_v = nn.LayerNorm(dim)  # with PyTorch's epsilon, as released, unlike the other norms
        self.q = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens row by row, (B, H * W, C), and (H, W) -> (B, H * W, C)."""
        heads = (self.num_heads, -1)
        query = self.q(x).softmax(1).unflatten(2, heads)  # where on the grid a channel looks, (B, N, heads, d)
        key = x.softmax(1).unflatten(2, heads).mean(-1)  # where a head is, (B, N, heads)
        weights = torch.einsum("bnhd,bnh->bhd", query, key).sigmoid() * self.temperature.squeeze(-1)
        return self.norm_v(self.mlp_v(x, grid)) * self.attn_drop(weights).flatten(1).unsqueeze(1)


class TapFanBlock(nn.Module):
    """Attention among tokens that are pooled first, then among channels.

    Args:
        dim: Width, C.
        num_heads: Attention heads; divides `dim`.
        mlp_ratio: Width inside the MLP, in widths of the block.
        num_scales: Scales of the pooling, at least 1.
        attn_drop: Dropout of probabilities, in [0, 1].
        drop_path: Chance that a sample skips a branch in training, in 0..1.
        eps: Of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_scales: int = 4,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = TokenAttention(dim, num_heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = ChannelAttention(dim, num_heads, int(dim * mlp_ratio), attn_drop)
        self.dilation_predictor = TokenAwareAveragePooling(dim, num_scales)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens row by row, (B, H * W, C), and (H, W) -> (B, H * W, C)."""
        pooled = self.dilation_predictor(x, grid)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(pooled)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), grid))


class TapFan(TapBackbone):
    """Two stages of ConvNeXt, blocks of token and channel attention on a grid of stride 16, and class attention.

    Any picture whose sides are at least 16 pixels will do; of sides that 16 doesn't divide, the released convolutions
    leave out what is over. Levels, for features: the stages, with strides 4 and 8, each block, and the class attention,
    which norms the tokens of the picture as well. `features_only` gives the stages, the last block and the class
    attention, as the authors take them for segmentation.

    Args:
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: What the classifier sees: "token" ([CLS]), "avg" (the mean of the others) or "" (each).
        conv_dims: Widths of the two stages of convolutions.
        conv_depths: Their blocks.
        embed_dim: Width of the tokens.
        depth: Blocks of attention.
        num_heads: Attention heads.
        mlp_ratio: Width inside the MLPs, in widths of the tokens.
        num_scales: Scales of the pooling, at least 1.
        drop_rate: Dropout before the classifier, in [0, 1].
        attn_drop_rate: Dropout of attention, in [0, 1].
        drop_path_rate: Stochastic depth of every block of attention, in [0, 1).

    Raises:
        ValueError: If a setting is out of range.
    """

    pools = ("token", "avg", "")
    min_size = 16
    conv_levels = 2

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        conv_dims: Sequence[int] = (128, 256),
        conv_depths: Sequence[int] = (3, 3),
        embed_dim: int = 448,
        depth: int = 16,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_scales: int = 4,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_settings(drop_path_rate, embed_dim, num_heads, depth=depth, num_scales=num_scales)
        for name, values in (("conv_dims", conv_dims), ("conv_depths", conv_depths)):
            if len(values) != 2 or min(values) < 1:
                raise ValueError(f"{name} must be 2 numbers of at least 1, got {tuple(values)}")
        self.num_prefix_tokens = 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = _PatchEmbed(in_chans, conv_dims, conv_depths, embed_dim)
        self.pos_embed = PositionalEncodingFourier(dim=embed_dim)
        blocks = [
            TapFanBlock(embed_dim, num_heads, mlp_ratio, num_scales, attn_drop_rate, drop_path_rate)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        norm = partial(nn.LayerNorm, eps=1e-6)
        settings = {"qkv_bias": True, "attn_drop": attn_drop_rate, "norm_layer": norm, "tokens_norm": True}
        last = [ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, **settings) for _ in range(2)]
        self.cls_attn_blocks = nn.ModuleList(last)
        self.norm = norm(embed_dim)
        levels = [(dim, 4 * 2**i, f"patch_embed.backbone.stages.{i}") for i, dim in enumerate(conv_dims)]
        levels += [(embed_dim, 16, f"blocks.{i}") for i in range(depth)] + [(embed_dim, 16, "cls_attn_blocks")]
        self._finish_setup(in_chans, num_classes, global_pool, drop_rate, levels)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the papers' start: truncated normal of 0.02 for linear layers, fan-out for the MLPs' convolutions."""
        trunc_normal_(self.cls_token, std=0.02)
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        convolutions = [module for module in self.patch_embed.backbone.modules() if isinstance(module, nn.Conv2d)]
        for layer in linear + convolutions:
            _init(layer)
        for block in self.blocks:
            for conv in (block.mlp.mlp_v.dwconv.conv1, block.mlp.mlp_v.dwconv.conv2):
                nn.init.normal_(conv.weight, std=math.sqrt(2 / 9))
                nn.init.zeros_(conv.bias)

    def _init_head(self, head: nn.Linear) -> None:
        _init(head)

    def token_attentions(self) -> list[nn.Module]:
        return [block.attn for block in self.blocks]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: embeddings and temperatures."""
        names = ("cls_token", "pos_embed.token_projection.weight", "temperature")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters by depth, for layer-wise learning rates; `coarse` makes blocks one group."""
        last = r"^cls_attn_blocks" if coarse else r"^cls_attn_blocks\.(\d+)"
        return {
            "stem": r"^(?:patch_embed|pos_embed)\b",
            "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)",
            "class": [(last, None), (r"^cls_token", None if coarse else (0,)), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for stage in self.patch_embed.backbone.stages:
            stage.grad_checkpointing = enable

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _levels(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, Grid]]:
        x = self.patch_embed.backbone.stem(x)
        for stage in self.patch_embed.backbone.stages:
            x = stage(x)
            yield x.flatten(2).mT, tuple(x.shape[2:])
        x = self.patch_embed.proj(x)
        grid = tuple(x.shape[2:])
        x = (x + self.pos_embed(1, *grid)).flatten(2).mT  # (B, N, C)
        for block in self.blocks:
            x = self._run(block, x, grid)
            yield x, grid
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        yield x, grid

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def _cut(self, count: int) -> None:
        self.patch_embed.backbone.stages = self.patch_embed.backbone.stages[:count]
        self.blocks = self.blocks[: max(0, count - self.conv_levels)]
        self.cls_attn_blocks = nn.ModuleList()
        self.cls_token = None
        self.num_prefix_tokens = 0
        if not self.blocks:
            self.patch_embed.proj = self.pos_embed = nn.Identity()


class _SampleNorm2d(LayerNorm2d):
    """A norm over channels by their sample variance, whose denominator is C - 1.

    The released code computes that for maps whose channels come last in memory, which are all but those of the stem.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = 1 - 1 / x.shape[1]
        x = x.movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], self.weight * part**0.5, self.bias, self.eps * part).movedim(-1, 1)


class _PatchEmbed(nn.Module):
    """Two stages of ConvNeXt, strides 4 and 8, and a projection to tokens of stride 16."""

    def __init__(self, in_chans: int, dims: Sequence[int], depths: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0]))
        settings = {"ls_init_value": 1e-6, "conv_mlp": True, "norm_layer": _SampleNorm2d}
        self.backbone.stages = nn.Sequential(
            ConvNeXtStage(dims[0], dims[0], stride=1, depth=depths[0], **settings),
            ConvNeXtStage(*dims, stride=2, depth=depths[1], **settings),
        )
        self.proj = nn.Conv2d(dims[-1], embed_dim, 2, stride=2)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: TapFan) -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint; they fit pictures of any size."""
    return released_weights(state_dict)


@register_model
def tap_fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> TapFan:
    """FAN-B-Hybrid with TAP: 50.7 M parameters, published top-1 84.3, mCE 43.7."""
    if pretrained:
        check_weights(NAME, kwargs)
    return build_model_with_cfg(
        TapFan,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, -2, -1), "feature_cls": "getter"},
        **kwargs,
    )


def _init(layer: nn.Linear | nn.Conv2d) -> None:
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
