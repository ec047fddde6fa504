"""AveragePool: the mean of each s x s region of patches, projected as the model always did.

Papers: https://arxiv.org/abs/2405.20985 (DeCo, Yao et al., 2024), which pools the patches before the projector; at
several scales in one model https://arxiv.org/abs/2405.17430 (M3, Cai et al., 2024). Training-free it loses what differs
inside a region; both papers train the model with it. Differs from them: the projector starts as the model's own, the
pooled grid is whole regions, never an adaptive one, and training draws one scale for each batch, where M3 averages the
losses of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.condensing.condenser import Condenser, two_layers
from vltok.methods.condensing.regions import RegionProjector
from vltok.methods.condensing.token_packer.projector import GeluMlp
from vltok.tokens import Grid
from vltok.views import ProjectorSite


def average_regions(features: torch.Tensor, columns: int, scale: int) -> torch.Tensor:
    """Average the patches of each s x s region.

    Args:
        features: Patches row by row, (B, N, C).
        columns: Patches of a row, divisible by `scale`, as rows are.
        scale: Side s of a region.

    Returns:
        Means, (B, N / s^2, C), regions row by row.
    """
    from einops import reduce  # here, so that `import vltok` loads torch alone

    return reduce(features, "b (h i w j) c -> b (h w) c", "mean", i=scale, j=scale, w=columns // scale)


class AveragePoolProjector(RegionProjector):
    """Average the patches of each region, then project: linear, GELU, linear.

    Args:
        grid: Patches of an image, (H, W) or the side of a square.
        dim: Channels of a patch, C.
        width: Between the linear layers.
        hidden: Width of the language model, D.
        scale_factor: Side s of a region, or several.

    Raises:
        TypeError, ValueError: As for `RegionProjector`.
    """

    def __init__(
        self, grid: int | Grid, dim: int, width: int, hidden: int, scale_factor: int | tuple[int, ...] = 2
    ) -> None:
        super().__init__(grid, scale_factor)
        self.dim = dim
        self.mlp = GeluMlp(dim, width, hidden)

    def forward(self, features: torch.Tensor, scale_factor: int | None = None) -> torch.Tensor:
        """Condense the patches of each image.

        Args:
            features: (B, N, C), patches row by row.
            scale_factor: One of those that the projector was made for; the first by default.

        Returns:
            Visual tokens, (B, N / s^2, D), regions row by row.

        Raises:
            ValueError: If the shape or the scale factor is not as said above.
        """
        scale = self.scale_of_call(scale_factor)
        self.check_features(features, self.dim, f"{self.dim} channels")
        return self.mlp(average_regions(features, self.grid[1], scale))


@register("average_pool")
@dataclass(frozen=True)
class AveragePool(Condenser):
    """Average each region of patches before the model's own projector, which may be trained on: s^2 times fewer tokens.

    Attributes:
        scale_factor: Side s of a region of patches that becomes one token; must divide the model's patch grid. Several,
            such as (2, 4), make one projector that serves each of them: the first counts, and in
            `handle.using(scale_factor=4)` the one that is given.
    """

    def projector(self, site: ProjectorSite) -> tuple[AveragePoolProjector, tuple[int, ...]]:
        first, second = two_layers(site)
        sizes = first.in_features, first.out_features, second.out_features
        projector = AveragePoolProjector(site.grid, *sizes, self.scale_factor)
        projector.mlp.start_from(first, second)
        return projector, site.levels
