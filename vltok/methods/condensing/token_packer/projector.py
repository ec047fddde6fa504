"""TokenPackerProjector: one visual token from each s x s region of patches, as a module.

Paper: https://arxiv.org/abs/2407.02392 (Li et al., IJCV 2025). A point query, the region's patch at low resolution,
gathers what the region's patches hold at several depths of the vision tower. Parameters carry the released names, and
results are those of the released module. Differs from it in how they are computed: keys and values are never projected
by the attention, their projections are moved to the query and to the weighted mean of the values, of which there are
s^2 times fewer; and under autograd only the outputs of the large matrix products are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from vltok.methods.weights import load_weights, weights_around

NORM_EPS = 1e-6


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)) that holds x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)  # under autocast the product ran in x's dtype, whatever the weight's
        grad_x = grad_weight = grad_bias = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.mT @ F.gelu(x).flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(x.dtype)
            torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)  # in place
        return grad_x, grad_weight, grad_bias


class _TwoLinears(torch.autograd.Function):
    """Two linear layers of one input. The gradient to it, the largest tensor of all, is summed in place."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, *parameters[:2]), F.linear(x, *parameters[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        dtype = grads[0].dtype  # under autocast that of the products, else that of all
        rows, grads = x.flatten(0, -2).to(dtype), [grad.flatten(0, -2) for grad in grads]
        grad_x, grad_parameters = None, []
        for number, parameter in enumerate(parameters):
            grad = grads[number // 2]
            if not ctx.needs_input_grad[1 + number]:
                grad_parameters.append(None)
            else:
                total = grad.mT @ rows if parameter.dim() == 2 else grad.sum(0)
                grad_parameters.append(total.to(parameter.dtype))
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ parameters[0].to(dtype)
            grad_x = grad_x.addmm_(grads[1], parameters[2].to(dtype)).view_as(x).to(x.dtype)
        return grad_x, *grad_parameters


def _needs_lean_backward() -> bool:
    """Whether autograd records here. A compiler plans what to hold and what to recompute by itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more; an adapter's does more, and a hook wants to be called."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


class GeluMlp(nn.Sequential):
    """Linear, exact GELU, Linear: parameters 0.* and 2.*. Under autograd the GELU is recomputed, not held."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, hidden_features), nn.GELU(), nn.Linear(hidden_features, out_features))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Compute it; `hidden` is what the first layer makes of x, if that is known."""
        if not _needs_lean_backward() or not _is_plain(self[2]):
            return super().forward(x)
        return _GeluLinear.apply(self[0](x) if hidden is None else hidden, self[2].weight, self[2].bias)


def _score(query: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of query (heads, R, d) with keys (R, S, E), which weight (heads, d, E) would project -> (R, heads, S).

    S heads at a time, so that what lies between is never larger than the keys.
    """
    pairs = zip(query.split(keys.shape[1]), weight.split(keys.shape[1]), strict=True)
    return torch.cat([(q @ w).transpose(0, 1) @ keys.mT for q, w in pairs], 1)


def _gather(shares: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Means of values (R, S, E) by shares (R, heads, S), projected by weight (heads, d, E) -> (heads, R, d)."""
    pairs = zip(shares.split(values.shape[1], 1), weight.split(values.shape[1]), strict=True)
    return torch.cat([(p @ values).transpose(0, 1) @ w.mT for p, w in pairs])


class _NormedRegions(torch.autograd.Function):
    """_score or _gather of rows that are normalised first; holds the rows as they come and nothing of their size.

    Both are derivatives of one form, sum over heads of side^T (shares @ rows) weight^T: by the shares (R, heads, S) it
    gives scores, by the side (heads, R, d) gathered values. So one backward pass serves both.
    """

    @staticmethod
    def forward(ctx, by_shares: bool, small: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        weight, rows, gain, shift = rest
        ctx.by_shares = by_shares
        ctx.save_for_backward(small, *rest)
        normed = torch.native_layer_norm(rows, rows.shape[-1:], gain, shift, NORM_EPS)[0]
        return (_score if by_shares else _gather)(small, weight, normed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        small, weight, rows, gain, shift = ctx.saved_tensors
        side, shares = (small, grad) if ctx.by_shares else (grad, small)
        group = rows.shape[1]
        normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[-1:], gain, shift, NORM_EPS)
        grad_normed, grad_weight, grad_small = torch.zeros_like(rows), [], []
        for q, p, w in zip(side.split(group), shares.split(group, 1), weight.split(group), strict=True):
            gathered = (p @ normed).transpose(0, 1)  # (S heads, R, E)
            grad_weight.append(q.mT @ gathered)
            if ctx.by_shares:
                grad_small.append(gathered @ w.mT)
            del gathered
            probe = (q @ w).transpose(0, 1)  # (R, S heads, E)
            grad_normed.baddbmm_(p.mT, probe)
            if not ctx.by_shares:
                grad_small.append(probe @ normed.mT)
            del probe
        del normed
        grad_small = torch.cat(grad_small, 0 if ctx.by_shares else 1)
        norm_backward = torch.ops.aten.native_layer_norm_backward
        grads = norm_backward(grad_normed, rows, rows.shape[-1:], mean, rstd, gain, shift, [True] * 3)
        return None, grad_small, torch.cat(grad_weight), *grads


class RegionAttention(nn.Module):
    """Multi-head attention of one query to the few keys of its own region, with torch.nn.MultiheadAttention's weights.

    Computes the same as projecting all keys and values: q . (W k) = (W^T q) . k, the bias of the keys shifts all scores
    of a region alike, and the weights of a region sum to one. Comes in two halves, so that the keys are gone before
    there are values. Where `norm` is given, the half applies it to its rows itself.

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

    def weigh(
        self, weights: Sequence[torch.Tensor], query: torch.Tensor, keys: torch.Tensor, norm: nn.LayerNorm | None = None
    ) -> torch.Tensor:
        """How much of each key to take: `in_proj_weight` in its three parts, query (R, E), keys (R, S, E).

        Parts are cut by the caller, once for both halves: every cut pads a gradient to the size of the whole.

        Returns:
            Shares, (R, heads, S).
        """
        query = F.linear(query, weights[0], self.in_proj_bias.chunk(3)[0])
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # (heads, R, E / heads)
        return self._product(True, query * query.shape[-1] ** -0.5, weights[1], keys, norm).softmax(-1)

    def gather(
        self,
        weights: Sequence[torch.Tensor],
        shares: torch.Tensor,
        values: torch.Tensor,
        norm: nn.LayerNorm | None = None,
    ) -> torch.Tensor:
        """Take so much of each value: `in_proj_weight` in parts, shares (R, heads, S), values (R, S, E) -> (R, E)."""
        out = self._product(False, shares, weights[2], values, norm).transpose(0, 1).flatten(1)
        return self.out_proj(out + self.in_proj_bias.chunk(3)[2].to(out.dtype))

    def _product(
        self, by_shares: bool, small: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, norm: nn.LayerNorm | None
    ) -> torch.Tensor:
        weight = weight.unflatten(0, (self.num_heads, -1))  # (heads, E / heads, E)
        if norm is None:
            return (_score if by_shares else _gather)(small.to(rows.dtype), weight.to(rows.dtype), rows)
        operands = [x.to(rows.dtype) for x in (small, weight, rows, norm.weight, norm.bias)]
        return _NormedRegions.apply(by_shares, *operands)

    def extra_repr(self) -> str:
        return f"dim={self.out_proj.in_features}, num_heads={self.num_heads}"


class TokenPackerProjector(nn.Module):
    """Condense patch features of several tower levels into one token per region (TokenPacker), ready for the LM.

    Paper: https://arxiv.org/abs/2407.02392. Needs training, or released weights: see `from_official`.

    Args:
        grid: Patches of an image, (H, W) or the side of a square; both sides divisible by `scale_factor`.
        dim: Width of one level of the vision tower, C.
        hidden: Width of the language model, D.
        scale_factor: Side s of a region, at least 1: N patches become N / s^2 tokens.
        num_levels: Levels of the tower that come concatenated on channels.
        embed_dim: Width inside, E.
        num_heads: Attention heads; divides `embed_dim`.

    Raises:
        ValueError: If a size is below 1, or `scale_factor` doesn't divide the grid, or `num_heads` not `embed_dim`.
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        dim: int,
        hidden: int,
        scale_factor: int,
        num_levels: int = 4,
        embed_dim: int = 1024,
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        sizes = {"dim": dim, "hidden": hidden, "num_levels": num_levels, "embed_dim": embed_dim, "num_heads": num_heads}
        for name, value in {**sizes, "scale_factor": scale_factor, "grid": min(self.grid)}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(side % scale_factor for side in self.grid):
            fitting = [s for s in range(2, min(self.grid) + 1) if not any(side % s for side in self.grid)]
            raise ValueError(
                f"scale_factor={scale_factor} doesn't divide the grid of {self.grid[0]} x {self.grid[1]} patches; "
                f"scale factors that do: {', '.join(map(str, fitting)) or 'none but 1'}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        self.dim, self.hidden, self.scale_factor, self.num_levels = dim, hidden, scale_factor, num_levels
        self.q_proj_1 = nn.Linear(dim, embed_dim, bias=False)
        self.k_proj_1 = GeluMlp(num_levels * dim, embed_dim, embed_dim)
        self.v_proj_1 = GeluMlp(num_levels * dim, embed_dim, embed_dim)
        self.ln_q_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.ln_k_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.ln_v_1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.clip_attn = RegionAttention(embed_dim, num_heads)
        self.mlp = GeluMlp(embed_dim, hidden, hidden)
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """Visual tokens that an image becomes, N / s^2."""
        return self.grid[0] * self.grid[1] // self.scale_factor**2

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

    def forward(self, features: torch.Tensor, coarse: torch.Tensor | None = None) -> torch.Tensor:
        """Condense the patches of each image.

        Args:
            features: Levels of the tower, concatenated on channels, (B, N, num_levels * C), patches row by row.
            coarse: The level that point queries are made from, (B, N, C); the last of `features` by default.

        Returns:
            Visual tokens, (B, N / s^2, D), regions row by row.

        Raises:
            ValueError: If a shape is not as said above.
        """
        batch, patches = features.shape[0], self.grid[0] * self.grid[1]
        if features.shape[1:] != (patches, self.num_levels * self.dim):
            raise ValueError(
                f"features must be (B, {patches}, {self.num_levels * self.dim}): the patches of a "
                f"{self.grid[0]} x {self.grid[1]} grid without prefix tokens, {self.num_levels} levels of {self.dim} "
                f"channels; got {tuple(features.shape)}"
            )
        coarse = features[..., -self.dim :] if coarse is None else coarse
        if coarse.shape != (batch, patches, self.dim):
            raise ValueError(f"coarse must be {(batch, patches, self.dim)}, got {tuple(coarse.shape)}")
        query = self.ln_q_1(self.q_proj_1(self._points(coarse))).flatten(0, 1)  # (B * M, E)
        weights = self.clip_attn.in_proj_weight.chunk(3)
        first = (self.k_proj_1[0], self.v_proj_1[0])
        hidden: Sequence[torch.Tensor | None] = (None, None)
        if _needs_lean_backward() and all(map(_is_plain, (*first, self.k_proj_1[2], self.v_proj_1[2]))):
            hidden = _TwoLinears.apply(features, *(p for layer in first for p in (layer.weight, layer.bias)))
        shares = self.clip_attn.weigh(weights, query, *self._regions(self.k_proj_1(features, hidden[0]), self.ln_k_1))
        out = self.clip_attn.gather(weights, shares, *self._regions(self.v_proj_1(features, hidden[1]), self.ln_v_1))
        return self.mlp(out.unflatten(0, (batch, -1)))

    def _points(self, coarse: torch.Tensor) -> torch.Tensor:
        """Resize the patch map by 1 / s, bilinearly and without antialiasing: (B, N, C) -> (B, M, C)."""
        image = coarse.float().mT.unflatten(-1, self.grid)  # (B, C, H, W)
        size = tuple(side // self.scale_factor for side in self.grid)
        points = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return points.flatten(2).mT.to(coarse.dtype)

    def _regions(self, x: torch.Tensor, norm: nn.LayerNorm) -> tuple[torch.Tensor, nn.LayerNorm | None]:
        """Gather the patches of each region, row by row inside it: (B, N, E) -> (B * M, s * s, E).

        Returns:
            Them normalised, and None; where autograd records: them as they are, and the norm that is left to do.
        """
        s = self.scale_factor
        rows, columns = (side // s for side in self.grid)
        x = x.unflatten(1, (rows, s, columns, s)).transpose(2, 3)  # (B, rows, columns, s, s, E)
        x = x.flatten(3, 4).flatten(0, 2)
        return (x, norm) if _needs_lean_backward() else (norm(x).to(x.dtype), None)

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, dim={self.dim}, hidden={self.hidden}, scale_factor={self.scale_factor}, "
            f"num_levels={self.num_levels}"
        )

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        grid: int | tuple[int, int] = 24,
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
