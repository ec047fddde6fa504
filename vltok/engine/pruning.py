"""The pruning engine: carries out what selectors and judges decide, on embeddings, masks, positions and caches.

One engine sits on one model. Its hooks are bound methods, so a deepcopy of the model gets an engine of its own.

Stage 1 packs the kept positions of every row to the left before the language model; stage 2 packs once more between two
decoder layers; afterwards every hidden state goes back to the positions of the prompt: logits and labels stay aligned.
"""

from __future__ import annotations

import inspect
import weakref
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from vltok.edits import Edits
from vltok.engine.attention import attention_mass, indicator_values
from vltok.engine.cache import PrunedCache
from vltok.engine.call import Prompt, next_position
from vltok.engine.features import VisionRecorder
from vltok.engine.names import CACHE, cache_in
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.method import Run
from vltok.views import RelevanceJudge, TokenSelector


@dataclass
class Continuation:
    """A call without new images on top of a pruned cache."""

    cache: PrunedCache
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)


@dataclass
class Decided:
    """The decisions on a prompt, for `generate` without a cache: it sends the same images with a growing prompt."""

    encoded: weakref.ref
    ids: torch.Tensor
    decisions: dict[int, torch.Tensor]

    def about(self, prompt: Prompt) -> bool:
        """Whether `prompt` continues the one decided on."""
        if prompt.encoded is None or prompt.ids is None or self.encoded() is not prompt.encoded:
            return False
        begun = prompt.ids[:, : self.ids.shape[1]]
        return prompt.ids.shape[1] > self.ids.shape[1] and torch.equal(begun, self.ids)


class PruningEngine:
    """Hooks of one model that prune its visual tokens."""

    def __init__(self, family: Any, run: Run) -> None:
        self.family = family
        self.run = run
        self.recorder = VisionRecorder()
        self.selector: TokenSelector | None = None
        self.judge: RelevanceJudge | None = None
        self.call: Prompt | Continuation | None = None
        self._decided: Decided | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PruningEngine:
        copy = PruningEngine(self.family, Run())
        copy.selector, copy.judge = self.selector, self.judge
        memo[id(self)] = copy
        copy.recorder = deepcopy(self.recorder, memo)
        return copy

    def install(self, edits: Edits, model: nn.Module) -> None:
        """Hook the model, its language model and decoder layers."""
        edits.before(model, self.before_model)
        edits.after(model, self.after_model, always=True)
        edits.before(model.language_model, self.before_language_model)
        edits.after(model.language_model, self.after_language_model)
        for index, layer in enumerate(model.language_model.layers):
            edits.before(layer, partial(self.before_layer, index))
        self.family.watch_vision(edits, model, self.recorder)

    def use_selector(self, edits: Edits, model: nn.Module, selector: TokenSelector) -> None:
        """Let `selector` prune at the entry of the language model."""
        if self.selector is not None:
            raise ValueError(f"{type(self.selector).__name__} already selects visual tokens here; give one selector")
        if selector.positions == "reindex" and self.family.multi_axis_positions:
            raise ValueError(
                f"{self.family.title} gives visual tokens positions on several axes, which can't be counted anew; "
                'use positions="keep"'
            )
        request = selector.attention_request(self.family.has_cls(model))
        if request is not None:
            self.family.watch_attention(edits, model, self.recorder, request)
        self.selector = selector

    def use_judge(self, edits: Edits, model: nn.Module, judge: RelevanceJudge) -> None:
        """Let `judge` drop all visual tokens inside the decoder."""
        if self.judge is not None:
            raise ValueError(f"{type(self.judge).__name__} already drops visual tokens in this decoder; give one")
        layers = model.language_model.layers
        for layer in judge.candidate_layers(len(layers)):
            attention = layers[layer - 1].self_attn
            missing = [name for name in ("v_proj", "o_proj", "head_dim") if not hasattr(attention, name)]
            if missing:
                raise UnsupportedModelError(
                    f"{type(attention).__name__} has no {', '.join(missing)}; dropping visual tokens inside the "
                    "decoder needs separate value and output projections, as Llama, Mistral and Qwen2 have"
                )
            edits.after(attention, partial(self.after_attention, layer - 1))
        self.judge = judge

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Tell a prompt with images from a continuation and from plain text."""
        kwargs = dict(kwargs)
        if args:
            kwargs.update(zip(inspect.signature(module.forward).parameters, args, strict=False))
        self.call = None
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise UnsupportedInputError("visual tokens of videos can't be pruned yet; remove the handle to run videos")
        record = PrunedCache.of(cache_in(kwargs))
        if kwargs.get("pixel_values") is not None or encoded.get("image") is not None:
            self.call = self._open_prompt(module, kwargs, encoded.get("image"))
        elif record is not None:
            self.call = _continue(kwargs, record)
        return (), kwargs

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forget the call, also if it failed."""
        self.call = None

    def _open_prompt(self, module: nn.Module, kwargs: dict, encoded: object | None) -> Prompt:
        mask, ids, cache = kwargs.get("attention_mask"), kwargs.get("input_ids"), cache_in(kwargs)
        if getattr(cache, "is_compileable", False):
            raise UnsupportedInputError(
                f"{type(cache).__name__} reserves room for every token of the prompt, so pruning can't shorten it; use "
                "the default dynamic cache, or remove the handle"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedInputError(
                "images can't be pruned on top of a filled KV cache (an earlier turn, or a chunked prefill); send the "
                "whole conversation with a fresh cache"
            )
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise UnsupportedInputError(
                "pruning needs a two-dimensional attention_mask (batch, length), or none; a ready-made attention map "
                "can't be shortened"
            )
        placeholder = self.family.image_token_id(module)
        if ids is not None:
            visual = ids == placeholder
        else:
            embeds = kwargs["inputs_embeds"]
            visual = (embeds == module.get_input_embeddings()(torch.tensor(placeholder, device=embeds.device))).all(-1)
        attended = torch.ones_like(visual) if mask is None else mask.to(visual.device).bool()
        visual, attended = torch.stack([visual, attended]).cpu()
        if (visual & ~attended).any():
            raise UnsupportedInputError("attention_mask hides image placeholders; it may hide padding only")
        return Prompt(model=module, ids=ids, visual=visual, attended=attended, encoded=encoded)

    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Stage 1: let only the kept tokens in."""
        if self.call is None and PrunedCache.of(cache_in(kwargs)) is not None:
            raise UnsupportedInputError("a pruned KV cache must be continued through the whole model")
        if not isinstance(self.call, Prompt):
            return None
        prompt, embeds = self.call, kwargs["inputs_embeds"]
        prompt.group = [0] * len(module.layers)
        prompt.dropped = torch.zeros(len(embeds), dtype=torch.bool)
        prompt.select(embeds, self.family, self.recorder.encoding, self.selector)
        layout = prompt.layouts[0]
        reindex = self.selector is not None and self.selector.positions == "reindex"
        # The mask is passed even where it hides nothing: without it, gaps in the positions read as packed sequences.
        kept = {
            "inputs_embeds": layout.pack(embeds),
            "attention_mask": layout.real.long(),
            "position_ids": prompt.place(kwargs.get("position_ids"), reindex),
        }
        return args, {**kwargs, **kept}

    def after_language_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Put every hidden state back to the positions of the prompt, and leave the record on the cache."""
        prompt = self.call
        if not isinstance(prompt, Prompt):
            return None
        layouts = [prompt.layouts[group] for group in (0, *prompt.group)]
        output.last_hidden_state = layouts[-1].unpack(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                state if state is None else layout.unpack(state)
                for layout, state in zip(layouts, output.hidden_states, strict=True)
            )
        cache = getattr(output, CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            PrunedCache(
                length=prompt.visual.shape[1],
                next_position=prompt.next_position,
                shift=prompt.shift,
                prompt_length=prompt.layouts[0].order.shape[1],
                real=[
                    None if (counts == counts.max()).all() else layout.real
                    for layout, counts in zip(prompt.layouts, prompt.counts, strict=True)
                ],
                group=prompt.group,
                entries=[layout.order.shape[1] for layout in prompt.layouts],
            ).keep_on(cache)
        resent = prompt.encoded is not None and prompt.ids is not None
        if self.judge is not None and resent and not self._is_decided(prompt):
            self._decided = Decided(weakref.ref(prompt.encoded), prompt.ids, prompt.decisions)
        self.run.report("pruning", prompt.report(cache))
        return output

    def after_attention(self, index: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Stage 2: look at the attention of layer `index` and decide whether visual tokens stay."""
        prompt = self.call
        if not isinstance(prompt, Prompt) or index in prompt.decisions:
            return
        if self._is_decided(prompt):
            prompt.drop_visual(index, self._decided.decisions[index])
            return
        layout = prompt.layouts[prompt.group[index]]
        text = prompt.attended & ~prompt.visual & (prompt.visual.cumsum(1) > 0)
        is_visual, is_text = (layout.pack(mask.to(layout.order.device)) & layout.real for mask in (prompt.visual, text))
        mass = _attention_mass(module, args, kwargs, torch.stack([is_visual, is_text], dim=-1))
        decision = torch.stack([value.float() for value in self.judge.judge(mass, is_visual, is_text)])
        prompt.drop_visual(index, decision.cpu())

    def _is_decided(self, prompt: Prompt) -> bool:
        return self._decided is not None and self._decided.about(prompt)

    def before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give a decoder layer the rows, rotary tables and mask of its layout."""
        call = self.call
        if call is None:
            return None
        if isinstance(call, Continuation):
            group, real = call.cache.group[index], call.cache.real[call.cache.group[index]]
            hidden = args[0] if args else kwargs["hidden_states"]
        else:
            kwargs = {**kwargs, "position_ids": None}  # rotary tables are made; flash attention would look for gaps
            group, layout = call.group[index], call.layouts[call.group[index]]
            hidden, real = args[0] if args else kwargs["hidden_states"], layout.real
            if group > 0:
                before = call.layouts[call.group[index - 1]]
                if before is not layout:
                    hidden = _rows(hidden, layout.within(before))
                slots = layout.within(call.layouts[0])
                kwargs["position_embeddings"] = tuple(_rows(table, slots) for table in kwargs["position_embeddings"])
        if group > 0:
            if group not in call.masks:
                call.masks[group] = create_causal_mask(
                    config=module.self_attn.config,
                    inputs_embeds=hidden,
                    attention_mask=real,
                    layer_idx=index,
                    **{CACHE: cache_in(kwargs)},
                )
            kwargs = {**kwargs, "attention_mask": call.masks[group]}
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _continue(kwargs: dict, record: PrunedCache) -> Continuation:
    """Translate mask and positions of tokens that arrive on top of a pruned cache."""
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch, count = tokens.shape[:2]
    record.follow(cache_in(kwargs).get_seq_length(), batch)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    fits = mask is None or (mask.dim() == 2 and mask.shape[1] == record.length + count)
    if fits and positions is not None:
        expected = record.next_position if record.shift is None else record.next_position + record.shift
        fits = bool((next_position(positions[..., :1]) == expected.to(positions.device) + 1).all())
    if not fits:
        raise UnsupportedInputError(
            f"{count} tokens came for a pruned KV cache that stands for {record.length} tokens, but attention_mask or "
            "position_ids say otherwise; generate() can't take up a pruned cache (it counts entries, not tokens): send "
            "the whole conversation with a fresh cache, or call the model with the new tokens only"
        )
    if positions is None:
        steps = torch.arange(count, device=record.next_position.device)
        kwargs["position_ids"] = record.next_position.unsqueeze(-1) + steps
    elif record.shift is not None:
        kwargs["position_ids"] = positions - record.shift.to(positions.device).unsqueeze(-1)
    record.extend(None if mask is None else mask[:, -count:].bool(), count)
    kwargs["attention_mask"] = record.real[0]
    return Continuation(record)


def _rows(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Take rows of (1 | B, S, C) by slots (B, P)."""
    slots = slots.to(x.device)
    x = x.expand(len(slots), -1, -1)
    return x.gather(1, slots.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def _attention_mass(module: nn.Module, args: tuple, kwargs: dict, columns: torch.Tensor) -> torch.Tensor:
    """Run an attention layer once more with indicator values: how much each row attends to each group of keys.

    Args:
        module: The attention of a decoder layer.
        args: Its arguments in the forward that just ran.
        kwargs: Its keyword arguments there.
        columns: The groups of keys, (B, S, G), bool.

    Returns:
        Attention mass, (B, S, G), float32, mean over the heads.
    """
    seen: list[torch.Tensor] = []

    def replace(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        width = module.head_dim
        return indicator_values(columns.to(output.device), output.shape[-1] // width, width, output.dtype)

    def read(layer: nn.Module, inputs: tuple) -> None:
        seen.append(inputs[0])

    hooks = [module.v_proj.register_forward_hook(replace), module.o_proj.register_forward_pre_hook(read)]
    training, module.training = module.training, False  # no attention dropout here
    try:
        module.forward(*args, **{**kwargs, CACHE: None})
    finally:
        module.training = training
        for hook in hooks:
            hook.remove()
    return attention_mass(seen[0], module.head_dim, columns.shape[-1])
