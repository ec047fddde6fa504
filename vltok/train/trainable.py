"""Which part of a model trains: presets for the stages of the published recipes, and LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from vltok.api import Handle
from vltok.errors import UnsupportedModelError

PARTS = ("projector", "llm", "tower")
# Where the parts are below the part of the model that the family is about. The first that fits counts.
_PLACES = {
    r"(visual|vision_model)\.(\w*merger\w*|downsample|connector)|vision_tower\.patch_merger": "projector",
    r"language_model|text_model|image_newline": "llm",  # image_newline is an embedding, as those of words are
    r"(\w+_)?(vision_tower|vision_model|vision_encoder|image_tower|video_tower|audio_tower|visual)": "tower",
    r"vqmodel|generation_\w+": "tower",  # these make pictures
    r"\w*(projector|projection|connector|aligner|resampler|merger)|embed_vision|embed_audio": "projector",
    r"visual_embeddings_table|high_res_vision_\w+": "projector",
}


def set_trainable(handle: Handle, parts: str) -> dict[str, int]:
    """Let parts of a model train and freeze all the rest.

    "projector" is what turns features of the vision tower into visual tokens, with all that the handle's methods added,
    "llm" the language model with its head and the newline embedding of AnyRes pictures, "tower" the vision tower, and
    "full" all of these.

    Args:
        handle: The methods on the model.
        parts: Parts joined by "+": "projector" (the published stage 1), "projector+llm" (stage 2), "llm", "full", ...

    Returns:
        Trainable parameters of each part, 0 for frozen ones.

    Raises:
        ValueError: If a part is unknown, or named twice.
    """
    names = list(PARTS) if parts == "full" else parts.split("+")
    if not set(names) <= set(PARTS) or len(set(names)) != len(names):
        raise ValueError(f'train must be parts out of {", ".join(PARTS)} joined by "+", or "full", got {parts!r}')
    counts = dict.fromkeys(PARTS, 0)
    for part, parameters in parts_of(handle).items():
        for parameter in parameters:
            parameter.requires_grad_(part in names)
            counts[part] += parameter.numel() if part in names else 0
    return counts


def parts_of(handle: Handle) -> dict[str, list[nn.Parameter]]:
    """Sort a model's parameters by the part they belong to.

    Raises:
        UnsupportedModelError: If one belongs to no part that is known here.
    """
    added = {id(parameter) for module in handle.added_modules for parameter in module.parameters()}
    inside = {id(parameter): name for name, parameter in handle.host.named_parameters()}
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in handle.model.named_parameters():
        path = inside.get(id(parameter))
        if id(parameter) in added:
            part = "projector"
        elif path is None:  # beside the family's part of the model there is only the head
            part = "llm"
        else:
            part = next((part for place, part in _PLACES.items() if re.match(rf"({place})(\.|$)", path)), None)
        if part is None:
            raise UnsupportedModelError(
                f"{name} of {type(handle.model).__name__} is in none of the parts {', '.join(PARTS)}; set "
                "requires_grad of its parameters yourself"
            )
        found[part].append(parameter)
    return found


def decoder_of(handle: Handle) -> nn.Module:
    """The language model without its head."""
    host = handle.host
    return host.language_model if hasattr(host, "language_model") else host.text_model


def add_lora(
    handle: Handle, rank: int, *, alpha: float | None = None, targets: Iterable[str] | None = None, dropout: float = 0.0
) -> nn.Module:
    """Put LoRA on the linear layers of the language model. What the handle added goes on training in full.

    Args:
        handle: The methods on the model; `set_trainable` has been called with parts that include "llm".
        rank: Rank r of the updates.
        alpha: Scale of the updates is alpha / rank; 2 * rank by default.
        targets: Names of the linear layers, such as "q_proj"; all of the decoder by default.
        dropout: Dropout before the updates, in [0, 1).

    Returns:
        The model as a PEFT model, for `VltokTrainer(handle, model=...)`.

    Raises:
        ValueError: If there is no such layer, or the model's own projector or tower is to be trained besides.
    """
    from peft import LoraConfig, get_peft_model

    added = {id(parameter) for module in handle.added_modules for parameter in module.parameters()}
    kept = [parameter for parameter in handle.model.parameters() if parameter.requires_grad and id(parameter) in added]
    parts = parts_of(handle)
    if not any(parameter.requires_grad for parameter in parts["llm"]):
        raise ValueError('LoRA trains the language model, and it is frozen; include "llm" in the parts that train')
    if any(p.requires_grad for part in ("projector", "tower") for p in parts[part] if id(p) not in added):
        raise ValueError(
            "LoRA trains the language model and what methods such as TokenPacker added, but the model's own projector "
            'or tower is to be trained too, and a LoRA file has no place for them; use train="llm", or train in full'
        )
    decoder = decoder_of(handle)
    linear = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear if targets is None else set(targets)
    if not wanted <= linear or not wanted:
        raise ValueError(f"LoRA targets must be among {', '.join(sorted(linear))}, got {', '.join(sorted(wanted))}")
    path = next(name for name, module in handle.model.named_modules() if module is decoder)
    config: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "lora_dropout": dropout}
    pattern = rf"{re.escape(path)}\.(.+\.)?({'|'.join(map(re.escape, sorted(wanted)))})"
    model = get_peft_model(handle.model, LoraConfig(target_modules=pattern, **config))
    for parameter in kept:
        parameter.requires_grad_(True)
    return model
