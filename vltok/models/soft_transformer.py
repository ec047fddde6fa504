"""SOFT's vision transformer: three stages of softmax-free attention on ever coarser grids, one of softmax attention.

Papers: https://arxiv.org/abs/2110.11945, https://arxiv.org/abs/2207.03341.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint
from torch import nn

from vltok.checks import check_choice, check_integer, is_number
from vltok.methods.soft.attention import SoftmaxFreeAttention
from vltok.models.soft_layers import PatchEmbed, SoftBlock, SoftmaxBlock
from vltok.tokens import Grid

STAGES = 4
POOLS = ("token", "avg", "")


class SoftTransformer(nn.Module):
    """A pyramid of four stages, with strides 4, 8, 16 and 32; a [CLS] token joins in the last.

    Any picture whose sides are at least `min_size` will do. Sides that a stride doesn't divide are rounded up, so that
    200 x 300 pixels make grids of 50 x 75, 25 x 38, 13 x 19 and 7 x 10; position embeddings are resized bilinearly.

    With `parity`, the default, released weights give the logits that they were released for, and two habits of the
    released code come along: rows and columns that a ratio leaves over get no landmarks, and the inverse of the
    landmarks' kernel is used even where Newton's iteration has not converged. In a -Norm model (`normalize`) that
    iteration starts from one number for the whole batch, so that the result for a picture depends on the others beside
    it. `parity=False` makes results independent of the batch and checks the inverse; choose it for training from
    scratch. Weights have the same names and shapes.

    Differs from the released code in training: `drop_path_rate` is stochastic depth, where there it drops single
    numbers.

    Args:
        img_size: Height and width of the pictures, or a square's side, that position embeddings are made for.
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: What the classifier sees: "token" ([CLS]), "avg" (the mean of the others) or "" (each).
        embed_dims: Width of each stage.
        num_heads: Attention heads of each stage; None makes heads of 32 channels.
        depths: Blocks of each stage.
        ratios: Sides of the regions that become landmarks, in the first three stages.
        conv_sizes: Sides of the convolutions of the values, in the first three stages.
        mlp_ratio: Width inside the MLPs, in widths of their stage.
        drop_rate: Dropout before the classifier, in [0, 1].
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.
        normalize: Whether it is SOFT-Norm.
        parity: Compute what the released code computes, see above.
        backend: What computes the kernel products, see `vltok.kernels.gaussian_mix.gaussian_mix`.

    Raises:
        ValueError: If a setting is out of range, or not one number for each stage.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] | None = None,
        depths: Sequence[int] = (1, 2, 3, 2),
        ratios: Sequence[int] = (8, 4, 2),
        conv_sizes: Sequence[int] = (9, 5, 3),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        normalize: bool = True,
        parity: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_heads = [max(1, dim // 32) for dim in embed_dims] if num_heads is None else num_heads
        _check_stages(embed_dims=embed_dims, num_heads=num_heads, depths=depths)
        _check_stages(STAGES - 1, ratios=ratios, conv_sizes=conv_sizes)
        if any(dim % heads for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(f"num_heads must divide embed_dims, got {tuple(num_heads)} and {tuple(embed_dims)}")
        if not is_number(drop_path_rate) or not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans = in_chans
        self.global_pool = _checked_pool(global_pool)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.num_prefix_tokens = 1
        self.ratios = tuple(ratios)
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"block{i + 1}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_stages = STAGES
        self._check_size(self.img_size, "img_size")

        for number, (grid, prefix) in enumerate(self.position_grids().values(), 1):
            rows = torch.empty(1, grid[0] * grid[1] + prefix, embed_dims[number - 1])
            setattr(self, f"pos_embed{number}", nn.Parameter(rows))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims[-1]))
        for number, (before, dim) in enumerate(pairwise((in_chans, *embed_dims)), 1):
            setattr(self, f"patch_embed{number}", PatchEmbed(before, dim, is_stem=number == 1))
        *soft_drops, last_drops = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = zip(embed_dims, num_heads, ratios, conv_sizes, soft_drops, strict=False)  # the last stage has no ratio
        for number, (dim, heads, ratio, conv_size, drops) in enumerate(stages, 1):
            blocks = nn.ModuleList()
            for drop in drops:
                attention = SoftmaxFreeAttention(
                    dim, heads, ratio, conv_size, normalize, backend=backend, parity=parity
                )
                blocks.append(SoftBlock(attention, mlp_ratio, drop))
            setattr(self, f"block{number}", blocks)
        last = [SoftmaxBlock(embed_dims[-1], num_heads[-1], mlp_ratio, drop) for drop in last_drops]
        setattr(self, f"block{STAGES}", nn.ModuleList(last))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the papers' start: truncated normal of 0.02 for linear layers and embeddings, fan-out for the others."""
        for module in self.modules():
            _init(module)
        for name in self.no_weight_decay():
            trunc_normal_(getattr(self, name), std=0.02)

    # What timm asks of a model

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: embeddings."""
        embeddings = {f"pos_embed{number}" for number in range(1, self.num_stages + 1)}
        return embeddings | ({"cls_token"} if self.num_stages == STAGES else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters by depth, for layer-wise learning rates; `coarse` makes stages groups."""
        return {
            "stem": r"^(?:patch_embed1|pos_embed1)\b",
            "blocks": [
                (r"^block(\d)" if coarse else r"^block(\d)\.(\d+)", None),
                (r"^(?:patch_embed|pos_embed)(\d)", None if coarse else (0,)),
                (r"^cls_token", (STAGES,) if coarse else (STAGES, 0)),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to compute blocks twice in training rather than hold what is inside them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The layer that gives logits, or an `nn.Identity`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place: `num_classes` and `global_pool` as for the constructor, None keeps it."""
        self.num_classes = num_classes
        self.global_pool = _checked_pool(self.global_pool if global_pool is None else global_pool)
        where = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **where) if num_classes > 0 else nn.Identity()
        _init(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and on request the final norm and the classifier.

        Returns:
            The stages that `indices` names, counted from 0.
        """
        taken = self._taken(indices)
        stages = max(taken) + 1
        is_shorter = stages < self.num_stages
        if is_shorter:
            for number in range(stages + 1, self.num_stages + 1):
                for name in ("patch_embed", "pos_embed", "block"):
                    delattr(self, f"{name}{number}")
            if self.num_stages == STAGES:
                del self.cls_token
                self.num_prefix_tokens = 0
            self.num_stages = stages
            self.num_features = self.head_hidden_size = self.feature_info[stages - 1]["num_chs"]
        if prune_norm or is_shorter:
            self.norm = nn.Identity()
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return taken

    # From pictures to logits

    @property
    def min_size(self) -> int:
        """The shortest side that a picture may have, in pixels: the ratios need a landmark in every stage."""
        return max((ratio - 1) * 4 * 2**i + 1 for i, ratio in enumerate(self.ratios[: self.num_stages]))

    def position_grids(self) -> dict[str, tuple[Grid, int]]:
        """For each position embedding by name, the grid that it is made for and the rows before those of the grid."""
        height, width = self.img_size
        strides = [4 * 2**i for i in range(self.num_stages)]
        grids = [(-(-height // stride), -(-width // stride)) for stride in strides]  # rounded up
        return {f"pos_embed{i + 1}": (grid, int(i == STAGES - 1)) for i, grid in enumerate(grids)}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Encode pictures, (B, in_chans, H, W) -> [CLS] and the tokens of the last stage, normalised, (B, 1 + N, C)."""
        return self.forward_intermediates(x, [])[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify what `forward_features` gave: logits, or with `pre_logits` what the classifier sees."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify pictures, (B, in_chans, H, W) -> logits, (B, num_classes).

        Raises:
            ValueError: If the pictures have other channels or are smaller than `min_size`.
        """
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Encode pictures and give the maps of stages.

        Args:
            x: Pictures, (B, in_chans, H, W).
            indices: Stages to give, from 0, negative from the end; a number gives so many of the last, None all.
            norm: Apply the final norm to the map of the last stage.
            stop_early: Leave out the stages behind the last of `indices`.
            output_fmt: "NCHW" is all there is.
            intermediates_only: Give the maps alone.

        Returns:
            What `forward_features` gives, or for `stop_early` the tokens of the stage that was last, (B, N, C); and the
            maps, (B, C, H / stride, W / stride) each, sides rounded up.

        Raises:
            ValueError: If the pictures have other channels or are smaller than `min_size`, or a stage doesn't exist.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"pictures must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        self._check_size(x.shape[2:], "pictures")
        taken, maps = self._taken(indices), []
        last = max(taken) if stop_early and taken else self.num_stages - 1
        image = x
        for i in range(last + 1):
            x, grid = self._stage(i + 1, image)
            is_final = i == self.num_stages - 1
            normed = self.norm(x) if is_final else x
            image = _image(normed if norm else x, grid)
            maps += [image] if i in taken else []
            x = normed
        return maps if intermediates_only else (x, maps)

    def _stage(self, number: int, image: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Run a stage on the map of the one before: (B, C', H', W') -> tokens, (B, [CLS] +) H * W, C), and (H, W)."""
        image = getattr(self, f"patch_embed{number}")(image)
        grid = tuple(image.shape[2:])
        x = image.flatten(2).mT  # (B, H * W, C)
        name = f"pos_embed{number}"
        made_for, prefix = self.position_grids()[name]
        if prefix:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + resample_abs_pos_embed(getattr(self, name), grid, made_for, prefix, "bilinear", antialias=False)
        for block in getattr(self, f"block{number}"):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x, grid

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Stages by their number from 0."""
        count = self.num_stages
        if isinstance(indices, int) or indices is None:
            indices = range(-(count if indices is None else indices), 0)
        if any(not -count <= i < count for i in indices):
            raise ValueError(f"stages must be in 0..{count - 1}, or from the end in -{count}..-1; got {list(indices)}")
        return [i % count for i in indices]

    def _check_size(self, size: Sequence[int], name: str) -> None:
        if min(size) < self.min_size:
            raise ValueError(
                f"{name} of {size[0]} x {size[1]} pixels are too small for landmarks with the ratios {self.ratios}: "
                f"make each side at least {self.min_size} pixels, or choose smaller ratios at construction"
            )


def _image(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens, of which the last H * W are the grid's, -> (B, C, H, W)."""
    return tokens[:, -grid[0] * grid[1] :].mT.unflatten(-1, grid)


def _check_stages(count: int = STAGES, **settings: Sequence[int]) -> None:
    for name, values in settings.items():
        if len(values) != count or min(values) < 1:
            raise ValueError(f"{name} must be {count} numbers of at least 1, got {tuple(values)}")
        for value in values:
            check_integer(name, value, least=1)


def _checked_pool(global_pool: str) -> str:
    check_choice("global_pool", global_pool, POOLS)
    return global_pool


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
