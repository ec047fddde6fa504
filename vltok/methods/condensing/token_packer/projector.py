"""TokenPackerProjector: one visual token from each s x s region of patches, as a module.

Paper: https://arxiv.org/abs/2407.02392 (Li et al., IJCV 2025). A point query, the region's patch at low resolution,
gathers what the region's patches hold at several depths of the vision tower. Parameters carry the released names, and
results are those of the released module. Differs from it in how they are computed: keys and values are never projected
by the attention, their projections are moved to the query and to the weighted mean of the values, of which there are
s^2 times fewer; and autograd holds the outputs of the large matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from vltok.autograd import is_recorded, recomputed
from vltok.checks import check_integer
from vltok.methods.condensing.regions import RegionProjector
from vltok.methods.weights import load_weights, weights_around
from vltok.tokens import Grid

NORM_EPS = 1e-6
Norm = Callable[[torch.Tensor], torch.Tensor]


class GeluMlp(nn.Sequential):
    """Linear, exact GELU, Linear: parameters 0.* and 2.*. Autograd holds what the first one gives, not its GELU."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, hidden_features), nn.GELU(), nn.Linear(hidden_features, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_recorded():
            return super().forward(x)
        first, gelu, second = self
        return recomputed(lambda hidden: second(gelu(hidden)), first(x))

    @torch.no_grad()
    def start_from(self, first: nn.Linear, second: nn.Linear, patches: int = 1) -> None:
        """Compute what two linear layers with a GELU between make of the mean of patches side by side, copying them."""
        self[0].weight.copy_(first.weight.repeat(1, patches) / patches)
        self[2].weight.copy_(second.weight)
        for own, old in ((self[0], first), (self[2], second)):
            own.bias.copy_(torch.zeros_like(own.bias) if old.bias is None else old.bias)


class RegionAttention(nn.Module):
    """Multi-head attention of one query to the few keys of its own region, with torch.nn.MultiheadAttention's weights.

    Computes the same as projecting all keys and values: q . (W k) = (W^T q) . k, the bias of the keys shifts all scores
    of a region alike, and the weights of a region sum to one. Comes in parts, so that the keys are gone before there
    are values; `out_proj` is left to the caller. Parts take `in_proj_weight` cut by the caller, once for all of them:
    every cut pads a gradient to the size of the whole. They norm keys and values themselves, so that a backward pass
    may compute norm and product again.

    Args:
        dim: Width of queries, keys, values and output, E.
        num_heads: Heads; divides `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def ask(self, weight: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Project queries (R, E) by the first third of the weights -> (heads, R, d), divided by sqrt(d)."""
        query = F.linear(query, weight, self.in_proj_bias.chunk(3)[0])
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        return query * query.shape[-1] ** -0.5

    def weigh(self, weight: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, norm: Norm) -> torch.Tensor:
        """How much of each key (R, S, E) to take; second third of the weights, query (heads, R, d) -> (R, heads, S).

        S heads at a time, so that what lies between is never larger than the keys.
        """
        keys = norm(keys).to(keys.dtype)
        pairs = zip(query.split(keys.shape[1]), self._heads(weight).split(keys.shape[1]), strict=True)
        return torch.cat([(q @ w).transpose(0, 1) @ keys.mT for q, w in pairs], 1).softmax(-1)

    def gather(self, weight: torch.Tensor, shares: torch.Tensor, values: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Take so much of each value (R, S, E); last third of the weights, shares (R, heads, S) -> (R, E)."""
        values = norm(values).to(values.dtype)
        pairs = zip(shares.split(values.shape[1], 1), self._heads(weight).split(values.shape[1]), strict=True)
        out = torch.cat([(p @ values).transpose(0, 1) @ w.mT for p, w in pairs])  # (heads, R, d)
        return out.transpose(0, 1).flatten(1) + self.in_proj_bias.chunk(3)[2].to(out.dtype)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (self.num_heads, -1))  # (E, n) -> (heads, d, n)

    def extra_repr(self) -> str:
        return f"dim={self.out_proj.in_features}, num_heads={self.num_heads}"


class TokenPackerProjector(RegionProjector):
    """Condense patch features of several tower levels into one token per region (TokenPacker), ready for the LM.

    Paper: https://arxiv.org/abs/2407.02392. Needs training, or released weights: see `from_official`.

    Args:
        grid: Patches of an image, (H, W) or the side of a square; both sides divisible by `scale_factor`.
        dim: Width of one level of the vision tower, C.
        hidden: Width of the language model, D.
        scale_factor: Side s of a region, at least 1: N patches become N / s^2 tokens. Of several the first counts where
            a call doesn't say; the weights are the same for all.
        num_levels: Levels of the tower that come concatenated on channels.
        embed_dim: Width inside, E.
        num_heads: Attention heads; divides `embed_dim`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1, a scale factor doesn't divide the grid, or `num_heads` not `embed_dim`.
    """

    def __init__(
        self,
        grid: int | Grid,
        dim: int,
        hidden: int,
        scale_factor: int | tuple[int, ...],
        num_levels: int = 4,
        embed_dim: int = 1024,
        num_heads: int = 8,
    ) -> None:
        super().__init__(grid, scale_factor)
        sizes = {"dim": dim, "hidden": hidden, "num_levels": num_levels}
        sizes |= {"embed_dim": embed_dim, "num_heads": num_heads}
        for name, value in sizes.items():
            check_integer(name, value, 1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        self.dim, self.hidden, self.num_levels = dim, hidden, num_levels
        self.q_proj_1 = nn.Linear(dim, embed_dim, bias=False)
        self.k_proj_1 = GeluMlp(num_levels * dim, embed_dim, embed_dim)
        self.v_proj_1 = GeluMlp(num_levels * dim, embed_dim, embed_dim)
        self.ln_q_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.ln_k_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.ln_v_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.clip_attn = RegionAttention(embed_dim, num_heads)
        self.mlp = GeluMlp(embed_dim, hidden, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the published start: truncated normal of 0.02 for linear layers, Xavier for the attention's inputs."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.clip_attn.in_proj_weight)
        nn.init.zeros_(self.clip_attn.in_proj_bias)

    def forward(
        self, features: torch.Tensor, coarse: torch.Tensor | None = None, scale_factor: int | None = None
    ) -> torch.Tensor:
        """Condense the patches of each image.

        Args:
            features: Levels of the tower, concatenated on channels, (B, N, num_levels * C), patches row by row.
            coarse: The level that point queries are made from, (B, N, C); the last of `features` by default.
            scale_factor: One of those that the projector was made for; the first by default.

        Returns:
            Visual tokens, (B, N / s^2, D), regions row by row.

        Raises:
            ValueError: If a shape or the scale factor is not as said above.
        """
        scale, batch, patches = self.scale_of_call(scale_factor), features.shape[0], self.grid[0] * self.grid[1]
        self.check_features(features, self.num_levels * self.dim, f"{self.num_levels} levels of {self.dim} channels")
        coarse = features[..., -self.dim :] if coarse is None else coarse
        if coarse.shape != (batch, patches, self.dim):
            raise ValueError(f"coarse must be {(batch, patches, self.dim)}, got {tuple(coarse.shape)}")
        attention = self.clip_attn
        to_query, to_key, to_value = attention.in_proj_weight.chunk(3)
        query = recomputed(self._queries, to_query, coarse, scale)
        keys = self._regions(self.k_proj_1(features), self.ln_k_1, scale)
        shares = recomputed(attention.weigh, to_key, query, *keys)
        del keys
        values = self._regions(self.v_proj_1(features), self.ln_v_1, scale)
        out = recomputed(attention.gather, to_value, shares, *values)
        del values
        return self.mlp(attention.out_proj(out).unflatten(0, (batch, patches // scale**2)))

    def _queries(self, weight: torch.Tensor, coarse: torch.Tensor, scale: int) -> torch.Tensor:
        """Ask for regions with the patch map at 1 / s, bilinear, not antialiased: (B, N, C) -> (heads, B * M, d)."""
        wide = torch.promote_types(coarse.dtype, torch.float32)
        image = coarse.to(wide).mT.unflatten(-1, self.grid)  # (B, C, H, W)
        size = tuple(side // scale for side in self.grid)
        points = F.interpolate(image, size=size, mode="bilinear", align_corners=False).flatten(2).mT  # (B, M, C)
        return self.clip_attn.ask(weight, self.ln_q_1(self.q_proj_1(points.to(coarse.dtype))).flatten(0, 1))

    def _regions(self, x: torch.Tensor, norm: Norm, s: int) -> tuple[torch.Tensor, Norm]:
        """Gather the patches of each region, row by row inside it: (B, N, E) -> (B * M, s * s, E).

        Returns:
            Them, and the norm that is left to do. Where autograd doesn't record, it is done, so that they are gone.
        """
        from einops import rearrange  # here, so that `import vltok` loads torch alone

        x = rearrange(x, "b (h i w j) e -> (b h w) (i j) e", i=s, j=s, w=self.grid[1] // s)
        return (x, norm) if is_recorded() else (norm(x).to(x.dtype), lambda rows: rows)

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, dim={self.dim}, hidden={self.hidden}, scale_factor={self.scale_factor}, "
            f"num_levels={self.num_levels}"
        )

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        grid: int | Grid = 24,
        scale_factor: int = 2,
        num_heads: int = 8,
    ) -> TokenPackerProjector:
        """Build the projector that released weights belong to.

        Args:
            state_dict: Weights with the official names, bare or behind a common prefix ("model.mm_projector."); a whole
                checkpoint's will do. Sizes, dtype and device are read from them.
            grid: Patches of an image, which weights don't tell.
            scale_factor: Side of a region, which weights don't tell.
            num_heads: Attention heads, which weights don't tell.

        Raises:
            CheckpointError: If weights are missing, unexpected or of the wrong shape; the message lists them.
        """
        anchor = "q_proj_1.weight"
        own = weights_around(state_dict, anchor)
        sizing = (anchor, "k_proj_1.0.weight", "mlp.0.weight")
        if all(own[name].dim() == 2 if name in own else False for name in sizing):
            embed_dim, dim = own[anchor].shape
            levels, hidden = own["k_proj_1.0.weight"].shape[1] // dim, own["mlp.0.weight"].shape[0]
        else:
            dim, hidden, levels, embed_dim = 1024, 4096, 4, 1024  # to name what is missing
        with torch.device("meta"):
            projector = cls(grid, dim, hidden, scale_factor, levels, embed_dim, num_heads)
        load_weights(projector, own, "a TokenPacker projector")
        return projector
