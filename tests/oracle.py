"""An oracle that knows nothing of the engine: the unpruned model, which the dropped tokens are hidden from.

In every decoder layer that attends, the dropped keys get a column of -inf in the layer's own mask, so the kept tokens
see what they would see if these were not there, at their own positions and in their own windows. Layers that hold a
state can't be told to forget a token: for decoders that have some, `short` calls the decoder on the kept tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from reference import assert_close
from tiny import TinyFamily, marks
from torch import nn

import vltok


def placeholders(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Where visual tokens stand, (B, T), bool."""
    return torch.isin(inputs["input_ids"], torch.tensor(list(marks(model).values())))


def dropped(report: vltok.Report, visual: torch.Tensor) -> torch.Tensor:
    """Which tokens a pruned call left out, (B, T), bool, where `visual` says which are visual."""
    gone = torch.zeros_like(visual)
    for row, (lengths, kept) in enumerate(zip(report.visual_tokens, report.keep_indices, strict=True)):
        places = visual[row].nonzero().squeeze(1)
        assert len(places) == sum(lengths)
        for own, indices in zip(places.split(lengths), kept, strict=True):
            gone[row, own] = True
            gone[row, own[indices.cpu()]] = False
    return gone


def decoder_of(model: nn.Module, family: TinyFamily) -> nn.Module:
    """The decoder that visual tokens enter."""
    return getattr(model.model, family.decoder)


def is_recurrent(decoder: nn.Module) -> bool:
    """Whether some layers hold a state instead of keys and values."""
    return any(not hasattr(layer, "self_attn") for layer in decoder.layers)


def counts_slots(decoder: nn.Module) -> bool:
    """Whether padding behind a prompt shifts what some layers see: a state, or blocks of keys, runs through it."""
    kinds = getattr(decoder.config, "layer_types", None) or ()
    return is_recurrent(decoder) or not set(kinds) <= {f"{kind}_attention" for kind in ("full", "sliding", "chunked")}


@contextmanager
def hidden(decoder: nn.Module, gone: torch.Tensor) -> Iterator[None]:
    """Hide tokens, (B, T), bool, from every query of an unpruned eager decoder in calls without a cache."""

    def hide(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]  # (B, 1, T, T), float or bool
        columns = nn.functional.pad(gone, (0, mask.shape[-1] - gone.shape[-1]))[:, None, None]
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(columns, lowest)}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True, prepend=True) for layer in decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def longer(inputs: Any, words: torch.Tensor, word_type: int = 0) -> dict[str, Any]:
    """The inputs with more words, (B, n), behind each prompt; `word_type` is what `token_type_ids` says of them."""
    count = words.shape[1]
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], words], dim=1)
    values = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": word_type, "labels": -100}
    for name, value in values.items():
        if name in grown:
            grown[name] = nn.functional.pad(grown[name], (0, count), value=value)
    return grown


@torch.no_grad()
def check_prefill_and_words(
    eager: nn.Module, family: TinyFamily, inputs: Any, method: vltok.Method, steps: int = 6, tolerance: float = 1e-5
) -> None:
    """Compare a pruned model with the oracle: logits of the kept tokens of a prompt, and those of words behind it."""
    visual, decoder = placeholders(eager, inputs), decoder_of(eager, family)
    with vltok.apply(eager, method) as handle:
        actual = eager(**inputs).logits
        report = handle.report(file=None)
        answer = eager.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    gone = dropped(report, visual)
    assert gone.any()
    words = answer.sequences[:, -steps:]
    plain = eager(**inputs).logits
    with hidden(decoder, gone):
        expected = eager(**longer(inputs, words[:, :-1], family.word_type), use_cache=False).logits
    seen = inputs["attention_mask"].bool() & ~gone
    length = visual.shape[1]
    assert_close(actual[seen], expected[:, :length][seen], tolerance)
    assert not torch.allclose(plain[:, -1], expected[:, length - 1], atol=1e-3), "pruning should matter"
    assert_close(torch.stack(answer.logits, 1), expected[:, length - 1 :], tolerance)
