"""Makes the projector of a condenser for the model that a config describes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vltok.engine.projector import projector_site
from vltok.errors import CheckpointError, UnsupportedModelError
from vltok.methods.condensing.regions import RegionProjector
from vltok.serving.condenser import SavedCondenser

TOWERS = ("clip_vision_model", "siglip_vision_model")  # whose images are all of one size


def make_projector(config: Any) -> tuple[RegionProjector, tuple[int, ...]]:
    """Make the projector that a config asks for, without weights, and say which hidden states of the tower it reads.

    Raises:
        CheckpointError: As `SavedCondenser.of_config`; or if the settings don't fit the model.
        UnsupportedModelError: If the model or the condenser can't be served.
    """
    saved = SavedCondenser.of_config(config)
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise UnsupportedModelError(f"condensers are served on the vision towers {', '.join(TOWERS)}, this is {kind!r}")
    model = nn.Module()  # as much of it as is looked at
    model.config = config
    with torch.device("cpu"):
        model.multi_modal_projector = LlavaMultiModalProjector(config)
    site = projector_site(model, config.vision_feature_select_strategy)
    try:
        with torch.device("meta"):
            return saved.method.projector(site)
    except ValueError as error:
        raise CheckpointError(f"{saved.folder} doesn't fit this model: {error}") from error
