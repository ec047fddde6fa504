"""What TAP's backbones share: how a network of convolutions and blocks answers to timm, and how checkpoints are read.

Paper: https://arxiv.org/abs/2303.11126.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import get_device_dtype
from timm.models import clean_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from vltok.checks import check_choice, check_integer
from vltok.recompute import is_recomputing, statistics_kept
from vltok.tokens import Grid


class TapBackbone(nn.Module):
    """The part of a backbone that doesn't depend on its layers. It has levels: perhaps convolutions, then blocks.

    A subclass builds `norm`, calls `_finish_setup`, and defines `_levels`, `_cut`, `token_attentions` and
    `forward_head`.
    """

    pools: ClassVar[tuple[str, ...]]
    min_size: ClassVar[int]  # the shortest side that a picture may have, in pixels
    conv_levels: ClassVar[int] = 0  # levels before the first block, whose maps are narrower than the final norm
    num_prefix_tokens = 0

    def _finish_setup(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        levels: Sequence[tuple[int, int, str]],
    ) -> None:
        """Set what timm reads. Levels are given by their channels, stride and name."""
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.feature_info = [{"num_chs": dim, "reduction": stride, "module": name} for dim, stride, name in levels]
        self.num_features = self.head_hidden_size = levels[-1][0]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def token_attentions(self) -> list[nn.Module]:
        """The modules that attend from tokens to tokens, by block; probabilities go through their `attn_drop`.

        A forward hook on `attn_drop` sees what the attention diversification loss is about, (B, heads, N, N).
        """
        raise NotImplementedError

    def _levels(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, Grid]]:
        """Pictures -> after each level its tokens, (B, N, C), perhaps with others in front, and their grid."""
        raise NotImplementedError

    def _cut(self, count: int) -> None:
        """Drop the levels after the first `count`."""
        raise NotImplementedError

    def _init_head(self, head: nn.Linear) -> None:
        """Draw a new classifier; PyTorch's way is right where this isn't overridden."""

    # What timm asks of a model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to compute blocks twice in training rather than hold what is inside them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The layer that gives logits, or an `nn.Identity`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place: `num_classes` and `global_pool` as for the constructor, None keeps it."""
        global_pool = self.global_pool if global_pool is None else global_pool
        check_choice("global_pool", global_pool, self.pools)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
            self._init_head(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the levels behind the last of `indices`, and on request the final norm and the classifier.

        Returns:
            The levels that `indices` names, counted from 0.
        """
        taken = self._taken(indices)
        count = max(taken) + 1
        is_shorter = count < len(self.feature_info)
        if is_shorter:
            self._cut(count)
            self.feature_info = self.feature_info[:count]
            self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        if prune_norm or count <= self.conv_levels:
            self.norm = nn.Identity()
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return taken

    # From pictures to logits

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Encode pictures, (B, in_chans, H, W) -> what `forward_head` takes, (B, tokens, C)."""
        return self.forward_intermediates(x, [])[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify what `forward_features` gave: logits, or with `pre_logits` what the classifier sees."""
        raise NotImplementedError

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
        """Encode pictures and give the maps of levels, which `feature_info` lists.

        Args:
            x: Pictures, (B, in_chans, H, W).
            indices: Levels to give, from 0, negative from the end; a number gives so many of the last, None all.
            norm: Apply the final norm to the maps of blocks.
            stop_early: Leave out the levels behind the last of `indices`.
            output_fmt: "NCHW" is all there is.
            intermediates_only: Give the maps alone.

        Returns:
            What `forward_features` gives, or for `stop_early` the tokens of the level that was last, (B, N, C); and the
            maps, (B, C, H / stride, W / stride) each, sides rounded down.

        Raises:
            ValueError: If the pictures have other channels or are smaller than `min_size`, or a level doesn't exist.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"pictures must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        check_size(x.shape[2:], self.min_size, "pictures")
        taken, maps = self._taken(indices), []
        final = len(self.feature_info) - 1
        last = max(taken) if stop_early and taken else final
        levels = self._levels(x)
        for i in range(last + 1):
            x, grid = next(levels)
            if i in taken:
                maps.append(_image(self.norm(x) if norm and i >= self.conv_levels else x, grid))
        if intermediates_only:
            return maps
        return (self._output(x) if last == final else x), maps

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of the last level -> what `forward_features` gives."""
        return x

    def _run(self, block: nn.Module, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x, grid)

        def run(x: torch.Tensor) -> torch.Tensor:
            with statistics_kept(block) if is_recomputing() else contextlib.nullcontext():
                return block(x, grid)

        return checkpoint(run, x, use_reentrant=False)

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Levels by their number from 0."""
        count = len(self.feature_info)
        if isinstance(indices, int) or indices is None:
            indices = range(-(count if indices is None else indices), 0)
        if any(not -count <= i < count for i in indices):
            raise ValueError(f"levels must be in 0..{count - 1}, or from the end in -{count}..-1; got {list(indices)}")
        return [i % count for i in indices]


def check_settings(drop_path_rate: float, embed_dim: int, num_heads: int, **counts: int) -> None:
    """Check settings of a backbone; `counts` must be at least 1.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a setting is out of range.
    """
    for name, value in {"embed_dim": embed_dim, "num_heads": num_heads, **counts}.items():
        check_integer(name, value, 1)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")


def check_size(size: Sequence[int], least: int, name: str) -> None:
    """Raise ValueError if a side is shorter than `least` pixels."""
    if min(size) < least:
        raise ValueError(
            f"{name} of {size[0]} x {size[1]} pixels are too small: make each side at least {least} pixels"
        )


def released_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint: those under "state_dict" or "model", or itself; no DDP prefix."""
    for name in ("state_dict", "model"):
        checkpoint = checkpoint.get(name, checkpoint)
    return clean_state_dict(checkpoint)


def _image(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens, of which the last H * W are the grid's, -> (B, C, H, W)."""
    return tokens[:, -grid[0] * grid[1] :].mT.unflatten(-1, grid)
