"""RegionProjector: what the condensing projectors share, a grid of patches cut into regions of s x s.

The weights of some fit any s. They are made for one or several, and a call says which.
"""

from __future__ import annotations

import torch
from torch import nn

from vltok.checks import check_integer
from vltok.tokens import Grid


def check_scales(scale_factor: object) -> None:
    """Check one scale factor, or a tuple of several.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is below 1 or comes twice, or there is none.
    """
    for scale in scale_factor if isinstance(scale_factor, tuple) else (scale_factor,):
        check_integer("scale_factor", scale, 1)
    if isinstance(scale_factor, tuple) and (not scale_factor or len(set(scale_factor)) < len(scale_factor)):
        raise ValueError(f"scale_factor must be a number, or several that differ, got {scale_factor}")


class RegionProjector(nn.Module):
    """Base of projectors that make one visual token of each s x s region of patches.

    Args:
        grid: Patches of an image, (H, W) or the side of a square; both sides divisible by every scale factor.
        scale_factor: Side s of a region, at least 1: N patches become N / s^2 tokens. Of several the first counts where
            a call doesn't say.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1, or a scale factor doesn't divide the grid or comes twice.
    """

    def __init__(self, grid: int | Grid, scale_factor: int | tuple[int, ...]) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(self.grid) != 2:
            raise ValueError(f"grid must be (H, W) or the side of a square, got {grid}")
        for side in self.grid:
            check_integer("grid", side, 1)
        check_scales(scale_factor)
        self.scale_factor = scale_factor
        for scale in self.scales:
            if any(side % scale for side in self.grid):
                fitting = [s for s in range(2, min(self.grid) + 1) if not any(side % s for side in self.grid)]
                raise ValueError(
                    f"scale_factor={scale} doesn't divide the grid of {self.grid[0]} x {self.grid[1]} patches; "
                    f"scale factors that do: {', '.join(map(str, fitting)) or 'none but 1'}"
                )

    @property
    def scales(self) -> tuple[int, ...]:
        """All scale factors, the first counts where a call doesn't say."""
        return self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,)

    @property
    def num_tokens(self) -> int:
        """Visual tokens that an image becomes at the first scale factor, N / s^2."""
        return self.grid[0] * self.grid[1] // self.scales[0] ** 2

    def scale_of_call(self, scale_factor: int | None) -> int:
        """The scale factor of a call that was given this one.

        Raises:
            ValueError: If the projector wasn't made for it.
        """
        if scale_factor is None:
            return self.scales[0]
        if scale_factor not in self.scales:
            raise ValueError(f"scale_factor must be one of {self.scales}, got {scale_factor!r}")
        return scale_factor

    def check_features(self, features: torch.Tensor, width: int, what: str) -> None:
        """Raise ValueError unless these are the patches of images, (B, N, width); `what` says what makes the width."""
        patches = self.grid[0] * self.grid[1]
        if features.dim() != 3 or features.shape[1:] != (patches, width):
            raise ValueError(
                f"features must be (B, {patches}, {width}): the patches of a {self.grid[0]} x {self.grid[1]} grid "
                f"without prefix tokens, {what}; got {tuple(features.shape)}"
            )

    def extra_repr(self) -> str:
        return f"grid={self.grid}, scale_factor={self.scale_factor}"
