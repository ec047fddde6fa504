"""InternVL: tiles of a picture and a thumbnail behind them, four patches merged into one visual token."""

from __future__ import annotations

import torch
from torch import nn

from vltok.engine.features import Encoding, ImageTokens
from vltok.families.vlm.base import VlmFamily


class InternVL(VlmFamily):
    """How InternVL is put together."""

    name = "internvl"
    title = "InternVL"
    model_classes = ("InternVLModel",)

    def images(self, model: nn.Module, encoding: Encoding, runs: list[int]) -> list[ImageTokens]:
        rows, length = encoding.features.shape[:2]
        if sum(runs) != rows * length or any(run % length for run in runs):
            return []
        attention = self._token_attention(model, encoding)
        images, row = [], 0
        for run in runs:  # an image is an unbroken run of placeholders
            tiles = run // length
            overview = torch.zeros(run, dtype=torch.bool)
            overview[-length:] = True
            images.append(
                ImageTokens(
                    length=run,
                    key=encoding.keys[row : row + tiles].sum(),
                    attention=None if attention is None else attention[row : row + tiles].flatten(),
                    is_overview=overview,
                    first=row * length,
                )
            )
            row += tiles
        return images

    def _token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """Mean attention of the patches behind each visual token, (R, N)."""
        attention = self.patch_attention(model, encoding)
        if attention is None:
            return None
        side = int(attention.shape[1] ** 0.5)
        merged = model.pixel_shuffle(attention.view(-1, side, side, 1), scale_factor=model.config.downsample_ratio)
        return merged.mean(-1).flatten(1)
