"""A second oracle: the decoder called on the kept tokens alone, as if nothing else had ever been there.

It holds for layers with a state, too, and where positions are counted anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import decoder_of, dropped, longer, placeholders
from reference import assert_close
from tiny import TinyFamily
from torch import nn

import vltok

CAP = "final_logit_softcapping"
TOKENWISE = ("per_layer_inputs",)  # what some decoders get for every token besides its embedding


def entering(model: nn.Module, family: TinyFamily, inputs: Any) -> dict[str, Any]:
    """What enters the decoder of an unpruned model, by name; positions are always there, ([axes,] B, T)."""
    seen: dict[str, Any] = {}
    decoder = decoder_of(model, family)
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    batch, length, _ = seen["inputs_embeds"].shape
    positions = seen.get("position_ids")
    positions = torch.arange(length).unsqueeze(0) if positions is None else positions
    seen["position_ids"] = positions.expand(*positions.shape[:-2], batch, length)
    return seen


@contextmanager
def windows(decoder: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let sliding windows of an eager decoder, in calls without a cache, count in these places of the tokens, (T,)."""
    far = places.unsqueeze(1) - places >= (getattr(decoder.config, "sliding_window", None) or len(places) + places[-1])

    def hide(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]  # (1, 1, T, T), float or bool
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(far, lowest)}

    kinds = getattr(decoder.config, "layer_types", None) or [""] * len(decoder.layers)
    slide = [layer for layer, kind in zip(decoder.layers, kinds, strict=True) if kind == "sliding_attention"]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in slide]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits_of_kept(
    model: nn.Module, family: TinyFamily, inputs: Any, gone: torch.Tensor, words: torch.Tensor, counts_anew: bool
) -> Iterator[torch.Tensor]:
    """Logits of the tokens of each prompt that are kept and of words behind it, (K + n, V).

    Args:
        model: The unpruned model.
        family: Its row.
        inputs: The prompts.
        gone: What is dropped, (B, T), bool.
        words: The words, (B, n).
        counts_anew: Whether positions count the kept tokens alone.
    """
    count, visual = words.shape[1], placeholders(model, inputs)
    given = entering(model, family, longer(inputs, words))
    keep = nn.functional.pad(inputs["attention_mask"].bool() & ~gone, (0, count), value=True)
    visual = nn.functional.pad(visual, (0, count))
    deep = given.get("deepstack_visual_embeds")
    for row, own in enumerate(keep):
        positions = given["position_ids"][..., row : row + 1, own]
        extra = {name: value[row : row + 1, own] for name, value in given.items() if name in TOKENWISE}
        if deep is not None:
            here = torch.zeros_like(keep)
            here[row] = own
            extra["visual_pos_masks"] = visual[row : row + 1, own]
            extra["deepstack_visual_embeds"] = [level[here[visual]] for level in deep]
        places = torch.arange(int(own.sum())) if counts_anew else own.nonzero().squeeze(1)
        with windows(decoder_of(model, family), places):
            states = decoder_of(model, family)(
                inputs_embeds=given["inputs_embeds"][row : row + 1, own],
                attention_mask=torch.ones(1, len(places), dtype=torch.long),  # without it, gaps would end samples
                position_ids=places.unsqueeze(0) if counts_anew else positions,
                use_cache=False,
                **extra,
            )
        logits, cap = model.lm_head(states.last_hidden_state)[0], getattr(model.config.get_text_config(), CAP, None)
        yield logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_prefill_and_words(
    model: nn.Module, family: TinyFamily, inputs: Any, method: vltok.Method, steps: int = 6, tolerance: float = 1e-5
) -> None:
    """Compare a pruned model with the oracle: logits of the kept tokens of prompts, and those of words behind them."""
    visual = placeholders(model, inputs)
    plain = model(**inputs).logits
    with vltok.apply(model, method) as handle:
        actual = model(**inputs).logits
        gone = dropped(handle.report(file=None), visual)
        answer = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert gone.any()
    assert not torch.allclose(plain[:, -1], actual[:, -1], atol=1e-3), "pruning should matter"
    words, counts_anew = answer.sequences[:, -steps:-1], method.positions == "reindex"
    for row, expected in enumerate(logits_of_kept(model, family, inputs, gone, words, counts_anew)):
        seen = inputs["attention_mask"][row].bool() & ~gone[row]
        prompt = int(seen.sum())
        assert_close(actual[row, seen], expected[:prompt], tolerance)
        assert_close(torch.stack([logits[row] for logits in answer.logits]), expected[prompt - 1 :], tolerance)
