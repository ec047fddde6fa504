"""LLaVA-1.5 and its kin: a CLIP or SigLIP tower, one row of the tower is one image."""

from __future__ import annotations

import torch
from torch import nn

from vltok.engine.features import Encoding
from vltok.engine.projector import projector_site
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.families.vlm.base import VlmFamily, mean_over_regions
from vltok.views import ProjectorSite

TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(VlmFamily):
    """LLaVA-1.5."""

    name = "llava"
    title = "LLaVA-1.5"
    model_classes = ("LlavaModel",)

    def check(self, model: nn.Module) -> None:
        kind = model.config.vision_config.model_type
        if kind not in TOWERS:
            raise UnsupportedModelError(
                f"a {self.title} model with a {kind!r} vision tower is not supported; supported are {', '.join(TOWERS)}"
            )

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        return projector_site(model, model.config.vision_feature_select_strategy)

    def token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        attention = self.row_attention(model, encoding, encoding.lengths[0] if encoding.lengths else 0)
        return None if attention is None else attention.flatten()

    def row_attention(self, model: nn.Module, encoding: Encoding, length: int) -> torch.Tensor | None:
        """Attention for each of the `length` projected tokens of a row, (R, length): -inf for a [CLS] among them."""
        attention = self.patch_attention(model, encoding)
        if attention is None:
            return None
        rows, columns = (side // self.patch_size(model) for side in encoding.pixels_shape[-2:])
        attention = mean_over_regions(attention, (rows, columns), length)
        prefix = length - attention.shape[1]
        if prefix < 0:
            raise UnsupportedInputError(
                f"the projector returns {length} tokens for {attention.shape[1]} patches; attention over patches can't "
                "be matched with them; choose a method that needs no vision attention"
            )
        return torch.nn.functional.pad(attention, (prefix, 0), value=-torch.inf)
