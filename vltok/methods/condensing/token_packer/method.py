"""TokenPacker: condense each s x s region of patches into one visual token with a trained projector.

Paper: https://arxiv.org/abs/2407.02392 (Li et al., IJCV 2025). Needs training: a model computes something else with it.
Differs from the paper: towers of any depth and width, and a start ("pool") from which an untrained projector averages
regions and projects them as the model always did, instead of speaking noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from vltok.checks import check_choice, check_integer, is_integer
from vltok.errors import UnsupportedModelError
from vltok.method import register
from vltok.methods.condensing.condenser import Condenser
from vltok.methods.condensing.token_packer.projector import TokenPackerProjector
from vltok.views import ProjectorSite, ProjectorView

LEVELS = (12, 16, 22, 23)  # of a tower of 24 layers; the projector that is replaced reads the last one
HEAD_DIM = 128
Init = Literal["random", "pool"]

# Standard deviation of the constants beside a value: so far above what features measure that a norm divides by it.
CONSTANT = 1024.0


@register("tokenpacker")
@dataclass(frozen=True)
class TokenPacker(Condenser):
    """Condense visual tokens in a new projector: s^2 times fewer. Not training-free: train it, or load its weights.

    Attributes:
        scale_factor: Side s of a region of patches that becomes one token; must divide the model's patch grid. Released
            are 2, 3 and 4. Several, such as (2, 3, 4), make one projector that serves each of them: the first counts,
            and in `handle.using(scale_factor=4)` the one that is given.
        levels: Hidden states of the vision tower to read (0 is the embeddings), ascending; point queries come from the
            last one. By default the level that the model's projector reads, and before it those at the published
            relative depths: 12, 16, 22, 23 in CLIP-L.
        init: Where training starts. "random" is the published start. "pool" makes the output equal to average pooling
            of each region followed by the model's own projector, in closed form and up to rounding.
        embed_dim: Width inside the projector. By default the tower's with init="random" (1024 as released), twice the
            tower's with init="pool", which needs at least that.
        num_heads: Attention heads, a divisor of embed_dim. By default one per 128 channels, as released.
    """

    levels: tuple[int, ...] | None = None
    init: Init = "random"
    embed_dim: int | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embed_dim", "num_heads"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_choice("init", self.init, Init)
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(self.levels))
            if not all(map(is_integer, self.levels)):
                raise TypeError(f"levels must be integers, got {self.levels}")
            if not self.levels or list(self.levels) != sorted(set(self.levels)):
                raise ValueError(f"levels must be different hidden states in ascending order, got {self.levels}")

    def settled(self, view: ProjectorView) -> TokenPacker:
        return self._settled(view.projector_site())

    def _settled(self, site: ProjectorSite) -> TokenPacker:
        embed_dim = self.embed_dim or site.dim * (2 if self.init == "pool" else 1)
        heads = self.num_heads or _heads(embed_dim)
        return replace(self, levels=self._levels_of(site), embed_dim=embed_dim, num_heads=heads)

    def projector(self, site: ProjectorSite) -> tuple[TokenPackerProjector, tuple[int, ...]]:
        method = self._settled(site)
        projector = TokenPackerProjector(
            grid=site.grid,
            dim=site.dim,
            hidden=site.hidden,
            scale_factor=self.scale_factor,
            num_levels=len(method.levels),
            embed_dim=method.embed_dim,
            num_heads=method.num_heads,
        )
        if self.init == "pool":
            if site.layers is None or site.levels != method.levels[-1:]:
                raise UnsupportedModelError(
                    f'init="pool" continues a projector of two linear layers with a GELU between, that reads the last '
                    f"of levels={method.levels}; {type(site.old).__name__} reads {site.levels}"
                    f'{"" if site.layers else " and is built otherwise"}; use init="random"'
                )
            start_from_pooling(projector, *site.layers)
        return projector, method.levels

    def _levels_of(self, site: ProjectorSite) -> tuple[int, ...]:
        if self.levels is None:
            last = max(site.levels)
            return tuple(sorted({round(level * last / LEVELS[-1]) for level in LEVELS}))
        if not 0 <= self.levels[0] <= self.levels[-1] <= site.depth:
            raise ValueError(
                f"levels must be in 0..{site.depth}, the hidden states of this model's vision tower; got {self.levels}"
            )
        return self.levels


def _heads(embed_dim: int) -> int:
    """One head per 128 channels, or as near to it as divides the width."""
    return max(heads for heads in range(1, max(1, embed_dim // HEAD_DIM) + 1) if embed_dim % heads == 0)


@torch.no_grad()
def start_from_pooling(projector: TokenPackerProjector, first: nn.Linear, second: nn.Linear) -> None:
    """Set weights so that the output is average pooling of each region, then linear, GELU, linear.

    The last level's channels x reach the attention unharmed: gelu(x) - gelu(-x) = x takes them through the GELU, and
    beside two large constants of opposite sign, and with a channel that holds minus the sum of all others, a layer norm
    is a division by a constant. Queries of zero make the attention a mean. What is left free keeps its random start,
    and weights of zero read it, so that everything can learn.

    Args:
        projector: Freshly made, with embed_dim >= 2 * dim and >= dim + 3.
        first: The first linear layer, (C -> D), copied.
        second: The second one, (D -> D), copied.

    Raises:
        ValueError: If the projector is too narrow.
    """
    dim = projector.dim
    attention, key, value = projector.clip_attn, projector.k_proj_1, projector.v_proj_1
    embed_dim = key[2].out_features
    if embed_dim < max(2 * dim, dim + 3):
        raise ValueError(
            f'init="pool" needs embed_dim of at least {max(2 * dim, dim + 3)}, twice the width of the vision tower; '
            f"got {embed_dim}"
        )
    one = torch.eye(dim)
    value[0].weight[: 2 * dim] = 0
    value[0].weight[: 2 * dim, -dim:] = torch.cat([one, -one])
    value[2].weight[:dim] = 0
    value[2].weight[:dim, : 2 * dim] = torch.cat([one, -one], dim=1)
    balance, anchors = dim, slice(embed_dim - 2, embed_dim)
    value[2].weight[anchors] = 0
    value[2].weight[balance] = -(value[2].weight.sum(0) - value[2].weight[balance])
    size = CONSTANT * 2 ** math.floor(math.log2((embed_dim / 2) ** 0.5))  # a power of two: exact in any dtype
    value[2].bias[anchors] = torch.tensor([size, -size])
    norm = projector.ln_v_1
    norm.weight.fill_(size * (2 / embed_dim) ** 0.5)  # undoes the division
    norm.weight[anchors] = norm.weight[balance] = 0

    queries, values = slice(0, embed_dim), slice(2 * embed_dim, 2 * embed_dim + dim)
    attention.in_proj_weight[queries] = 0
    attention.in_proj_weight[values] = torch.eye(dim, embed_dim)
    attention.out_proj.weight[:dim] = torch.eye(dim, embed_dim)
    projector.mlp[0].weight.zero_()
    for own, old in ((projector.mlp[0], first), (projector.mlp[2], second)):
        own.weight[:, : old.in_features] = old.weight.to(own.weight)
        own.bias.copy_(torch.zeros_like(own.bias) if old.bias is None else old.bias)
