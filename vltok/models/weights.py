"""Where the weights of a backbone come from: from files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import resolve_pretrained_cfg


def check_weights(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the arguments of a model with `pretrained=True` say of no file to read weights from."""
    config = resolve_pretrained_cfg(name, settings.get("pretrained_cfg"), settings.get("pretrained_cfg_overlay"))
    if not (config.has_weights or config.state_dict):
        raise ValueError(
            f"pretrained=True needs a file for {name}, as nothing is downloaded: get the authors' checkpoint and "
            f'pass pretrained_cfg_overlay={{"file": PATH}} as well, or checkpoint_path=PATH in place of it'
        )
