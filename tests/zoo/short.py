"""A second oracle: the decoder called on the kept tokens alone, as if nothing else had ever been there."""

from __future__ import annotations

from typing import Any

import torch
from oracle import decoder_of, longer
from tiny import TinyFamily
from torch import nn


def entering(model: nn.Module, family: TinyFamily, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the decoder of an unpruned model: embeddings, (B, T, D), and positions, ([axes,] B, T)."""
    seen: dict[str, Any] = {}
    decoder = decoder_of(model, family)
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1]).unsqueeze(0)
    return embeds, positions.expand(*positions.shape[:-2], *embeds.shape[:2])


@torch.no_grad()
def logits_of_kept(
    model: nn.Module, family: TinyFamily, inputs: Any, gone: torch.Tensor, words: torch.Tensor, counts_anew: bool
) -> torch.Tensor:
    """Logits of the tokens of one prompt that are kept and of words behind it, (K + n, V).

    Args:
        model: The unpruned model.
        family: Its row.
        inputs: The prompt, without padding.
        gone: What is dropped, (1, T), bool.
        words: The words, (1, n).
        counts_anew: Whether positions count the kept tokens alone.
    """
    keep = ~nn.functional.pad(gone, (0, words.shape[1]))[0]
    embeds, positions = entering(model, family, longer(inputs, words))
    positions = torch.arange(int(keep.sum())).unsqueeze(0) if counts_anew else positions[..., keep]
    states = decoder_of(model, family)(inputs_embeds=embeds[:, keep], position_ids=positions, use_cache=False)
    return model.lm_head(states.last_hidden_state)[0]
