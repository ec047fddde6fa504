"""PixelShuffle: the patches of each s x s region side by side on channels, then a projector that reads them at once.

Papers: https://arxiv.org/abs/2404.16821 (InternVL 1.5, Chen et al., 2024), which merges 2 x 2 patches so; the name
comes from https://arxiv.org/abs/1609.05158 (Shi et al., 2016), whose inverse it is. Needs training. Training-free it
is average pooling before the model's own projector, from which it starts. Differs from InternVL: any region, that
start, no layer norm, and the patches of a region come row by row, not column by column, which learned weights don't
notice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.checks import check_integer
from vltok.method import register
from vltok.methods.condensing.condenser import Condenser, two_layers
from vltok.methods.condensing.regions import RegionProjector
from vltok.methods.condensing.token_packer.projector import GeluMlp
from vltok.tokens import Grid
from vltok.views import ProjectorSite


def stack_regions(features: torch.Tensor, columns: int, scale: int) -> torch.Tensor:
    """Put the patches of each s x s region side by side on channels.

    Args:
        features: Patches row by row, (B, N, C).
        columns: Patches of a row, divisible by `scale`, as rows are.
        scale: Side s of a region.

    Returns:
        Regions row by row, (B, N / s^2, s^2 * C), the patches of each row by row.
    """
    from einops import rearrange  # here, so that `import vltok` loads torch alone

    return rearrange(features, "b (h i w j) c -> b (h w) (i j c)", i=scale, j=scale, w=columns // scale)


class PixelShuffleProjector(RegionProjector):
    """Put the patches of each region side by side on channels, then project: linear, GELU, linear.

    Args:
        grid: Patches of an image, (H, W) or the side of a square.
        dim: Channels of a patch, C.
        width: Between the linear layers.
        hidden: Width of the language model, D.
        scale_factor: Side s of a region. The first layer reads s^2 * C channels, so there is one.

    Raises:
        TypeError, ValueError: As for `RegionProjector`.
    """

    def __init__(self, grid: int | Grid, dim: int, width: int, hidden: int, scale_factor: int = 2) -> None:
        check_integer("scale_factor", scale_factor, 1)
        super().__init__(grid, scale_factor)
        self.dim = dim
        self.mlp = GeluMlp(scale_factor**2 * dim, width, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Condense the patches of each image.

        Args:
            features: (B, N, C), patches row by row.

        Returns:
            Visual tokens, (B, N / s^2, D), regions row by row.

        Raises:
            ValueError: If the shape is not as said above.
        """
        self.check_features(features, self.dim, f"{self.dim} channels")
        return self.mlp(stack_regions(features, self.grid[1], self.scale_factor))


@register("pixel_shuffle")
@dataclass(frozen=True)
class PixelShuffle(Condenser):
    """Project the patches of each region together: s^2 times fewer tokens. Not training-free: train it, or load it.

    Starts as average pooling of each region followed by the model's own projector, up to rounding.

    Attributes:
        scale_factor: Side s of a region of patches that becomes one token; must divide the model's patch grid. There is
            one: the first layer reads s^2 patches, so scale factors could share little of it.
    """

    scale_factor: int = 2

    def __post_init__(self) -> None:
        check_integer("scale_factor", self.scale_factor, 1)

    def projector(self, site: ProjectorSite) -> tuple[PixelShuffleProjector, tuple[int, ...]]:
        first, second = two_layers(site)
        sizes = first.in_features, first.out_features, second.out_features
        projector = PixelShuffleProjector(site.grid, *sizes, self.scale_factor)
        projector.mlp.start_from(first, second, self.scale_factor**2)
        return projector, site.levels
