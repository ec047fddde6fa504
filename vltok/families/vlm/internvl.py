"""InternVL: tiles of a picture and a thumbnail behind them, four patches merged into one visual token."""

from __future__ import annotations

import torch
from torch import nn

from vltok.engine.features import Encoding
from vltok.engine.pictures import Picture
from vltok.families.vlm.base import VlmFamily


class InternVL(VlmFamily):
    """How InternVL is put together."""

    name = "internvl"
    title = "InternVL"
    model_classes = ("InternVLModel",)
    unit = "run"
    patches = "rows"
    videos = "frames"
    cls = "yes"
    windows = True

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        overview = torch.zeros(picture.length, dtype=torch.bool)
        overview[-encoding.lengths[picture.entries.stop - 1] :] = True  # the thumbnail comes last
        return overview
