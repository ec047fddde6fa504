"""Hooks of the decoder and its layers. They hold nothing: what they need comes along with the call.

So a copy of a hooked module, such as an adapter library makes, does what its original did.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vltok.engine.attention import unreadable
from vltok.engine.cache import PrunedLayer, attention_layers, bytes_held, check_cache
from vltok.engine.call import Call
from vltok.engine.features import KEYWORD
from vltok.engine.layout import Layout, take
from vltok.engine.masks import packed_samples
from vltok.engine.names import CACHE
from vltok.engine.parts import layers_read
from vltok.engine.picking import pick_tokens
from vltok.engine.pictures import find_pictures
from vltok.engine.prompt import Prompt
from vltok.engine.rules import State, recall, remember
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.report import RelevanceRecord, Report


def before_decoder(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """At the entry: let only the kept tokens in."""
    call = kwargs.get(KEYWORD)
    if not isinstance(call, Call):
        return None
    if (embeds := kwargs.get("inputs_embeds")) is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is called without the keyword inputs_embeds, by which visual tokens enter; "
            "remove the handle"
        )
    call.enter(module.config, len(module.layers), embeds.device)
    if isinstance(call, Prompt):
        kwargs = {**kwargs, **_enter_prompt(call, module, embeds, kwargs)}
        wants_states = kwargs.get("output_hidden_states", getattr(module.config, "output_hidden_states", False))
        call.states = [] if wants_states and torch.is_grad_enabled() else None
    # A ready-made map keeps transformers from making masks by itself; every layer gets its own.
    kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    if "logits_to_keep" in kwargs:  # some run their last layers on these tokens alone
        kwargs["logits_to_keep"] = 0
    return args, {**kwargs, "inputs_embeds": kwargs.get("inputs_embeds", embeds)}


def _enter_prompt(prompt: Prompt, module: nn.Module, embeds: torch.Tensor, kwargs: dict) -> dict[str, Any]:
    """Pick, pack and place the tokens of a prompt; the arguments that change."""
    prompt.engine.tape.waiting = prompt.outer
    positions = kwargs.get("position_ids")
    find_pictures(prompt, embeds, prompt.engine.family, prompt.engine.recent)
    prompt.split_samples(_samples(prompt, module, positions, kwargs))
    visual, embeds = pick_tokens(prompt, embeds, prompt.engine.family)
    attended = (prompt.attended & ~prompt.visual) | visual
    keep = attended.clone()
    keep[:, -1] |= ~prompt.visual[:, -1]  # generate() reads the last column, also where it is padding
    prompt.keep = keep
    prompt.add_layout(keep, attended)
    layout = prompt.layouts[0]
    changed = {
        name: _pack_extra(prompt, value)
        for name, value in kwargs.items()
        if name not in ("inputs_embeds", "position_ids", "attention_mask", "input_ids")
    }
    if prompt.rule is not None:
        prompt.read = layers_read(prompt.rule, module)
        prompt.remembered = recall(prompt)
        deep = max((len(each) for name, each in kwargs.items() if "deepstack" in name and each is not None), default=0)
        if prompt.read and min(prompt.read) + 1 < deep:
            raise UnsupportedInputError(
                f"this model adds features of its vision tower to visual tokens in its first {deep} decoder layers, so "
                f"none can be dropped after layer {min(prompt.read) + 1}; drop them later, by a larger depth or layer"
            )
    prompt.take_maps(kwargs.get("attention_mask"))
    if prompt.base:
        _wrap(prompt)
    packed = layout.pack(embeds)
    prompt.entered = packed.detach() if prompt.read and not prompt.remembered else None
    return {**changed, "inputs_embeds": packed, "position_ids": prompt.place(positions)}


def _samples(prompt: Prompt, module: nn.Module, positions: torch.Tensor | None, kwargs: dict) -> torch.Tensor | None:
    """The packed samples of the rows, where the model itself would tell them apart: no mask, no cache, positions."""
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(module.config, "use_cache", False) if use_cache is None else use_cache
    is_checkpointed = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
    caches = prompt.cache is not None or (use_cache and not is_checkpointed)
    if positions is None or caches or prompt.mask is not None or prompt.maps:
        return None
    if positions.dim() == 3:
        if positions.shape[0] != 4:  # only the first of four axes counts text
            return None
        positions = positions[0]
    return packed_samples(positions.to(prompt.device).expand(len(prompt.visual), -1))


def _pack_extra(prompt: Prompt, value: Any) -> Any:
    """Cut what comes along with the tokens, (B, T, ...), or with the visual ones, (V, D), down to those kept."""
    if isinstance(value, list | tuple) and value and all(isinstance(each, torch.Tensor) for each in value):
        return type(value)([_pack_extra(prompt, each) for each in value])
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    batch, length = prompt.visual.shape
    layout = prompt.layouts[0]
    if value.shape[:2] == (batch, length):
        packed = layout.pack(value)
        return packed & layout.real if packed.dtype == torch.bool and packed.dim() == 2 else packed
    if value.dim() == 2 and value.is_floating_point() and len(value) == int(prompt.visual.sum()):
        return value[prompt.keep[prompt.visual].to(value.device)]
    return value


def before_layer(index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Give a decoder layer the rows, rotary tables and mask of its layout."""
    call = kwargs.get(KEYWORD)
    if not isinstance(call, Call):
        return None
    call.has_reached_layers = True
    hidden = args[0] if args else kwargs["hidden_states"]
    kwargs = dict(kwargs)
    if len(args) > 1:  # what else comes without a name may have rows of tokens, too
        kwargs.update(zip(list(inspect.signature(module.forward).parameters)[1:], args[1:], strict=False))
        args = args[:1]
    if isinstance(call, Prompt):
        hidden = _rows_of_layer(call, index, hidden, kwargs)
        # Rotary tables are made. Flash attention looks at positions alone, and takes gaps for the ends of samples.
        kwargs["position_ids"] = call.places_in_samples(call.groups[index])
    elif "position_ids" in kwargs:  # layers that count keys in blocks would look for blocks that aren't there
        kwargs["position_ids"] = None
    kwargs["attention_mask"] = call.mask_of(index, hidden)
    past = call.past(index)
    is_read = isinstance(call, Prompt) and index in call.read
    if past is not None and call.stores[index] == index:
        past.expect(hidden.shape[-2], watch=is_read)
    if not is_read:
        del kwargs[KEYWORD]
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _rows_of_layer(prompt: Prompt, index: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Bring hidden states, ([several,] B, P, D), and all that comes with them into the layout of a layer."""
    layout = prompt.layouts[prompt.groups[index]]
    before = prompt.layouts[prompt.groups[max(0, index - 1)]]
    if prompt.states is not None and len(prompt.states) == index:
        whole = before.unpack(hidden, dim=-2)  # on the path of the gradients, so that these reach what the caller gets
        prompt.states.append(whole)
        hidden = whole if layout.is_whole else take(whole, layout.order, dim=-2)
    elif before is not layout:
        hidden = take(hidden, layout.within(before), dim=-2)
    first = prompt.layouts[0]
    if layout is not first:
        slots = layout.within(first)
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple):
            kwargs["position_embeddings"] = tuple(take(table, slots, dim=-2) for table in tables)
        elif isinstance(tables, torch.Tensor):
            kwargs["position_embeddings"] = take(tables, slots, dim=-2)
        for name, value in kwargs.items():
            is_ours = name in ("position_embeddings", "attention_mask", "hidden_states")
            if not is_ours and isinstance(value, torch.Tensor) and value.shape[:2] == first.order.shape:
                kwargs[name] = take(value, slots)
    return hidden


@torch.compiler.disable  # it waits for the device and decides in Python
def after_attention(index: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Look at the attention of layer `index` and let the rule decide which visual tokens go on."""
    prompt = kwargs.get(KEYWORD)
    if not isinstance(prompt, Prompt) or index in prompt.decisions:  # a backward pass may run this again
        return
    if prompt.remembered:
        gone, prompt.recorded[index] = prompt.remembered[index]
    else:
        state = State(prompt, index, module, args, {name: v for name, v in kwargs.items() if name != KEYWORD})
        with torch.no_grad():
            keep = prompt.rule.keep(state)
        gone, prompt.recorded[index] = state.leaving(keep), state.records
    prompt.drop(index, gone)
    if prompt.read <= prompt.decisions.keys():
        prompt.entered = None  # nobody asks any more


def after_decoder(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Put every hidden state and attention map back to the positions of the prompt, and wrap the cache."""
    call = kwargs.get(KEYWORD)
    if not isinstance(call, Call):
        return None
    if not call.has_reached_layers:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands no keyword arguments to its layers, by which vltok tells them what was "
            "pruned; remove the handle, or let it hand on its **kwargs"
        )
    attentions, attending = getattr(output, "attentions", None), call.attending
    if attentions is not None and len(attentions) != len(attending):  # fused attention gives none
        attentions = None
    if attentions is not None:
        pairs = zip(attending, attentions, strict=True)
        attentions = [each if each is None else call.spread(index, each) for index, each in pairs]
    if isinstance(call, Prompt):
        if missing := call.read - call.decisions.keys():
            raise unreadable(module.layers[min(missing)])
        layouts = [call.layouts[group] for group in (0, *call.groups)]
        output.last_hidden_state = layouts[-1].unpack(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = _whole_states(call, layouts, output)
        if attentions is not None:
            attentions = [
                each if each is None or layout.is_whole else layout.unpack(each.transpose(1, 2)).transpose(1, 2)
                for layout, each in zip([layouts[1 + index] for index in attending], attentions, strict=True)
            ]
        cache = getattr(output, CACHE, None)
        if cache is not None:
            check_cache(cache)
            _label(call, cache)
        elif call.read:
            remember(call)
        call.engine.run.report("pruning", make_report(call, cache))
    if attentions is not None:
        output.attentions = tuple(attentions)
    return output


def _whole_states(prompt: Prompt, layouts: list[Layout], output: Any) -> tuple[torch.Tensor | None, ...]:
    """Hidden states at the places of the prompt; with gradients, the very ones that these pass through."""
    states = prompt.states or [None] * (len(layouts) - 1)
    prompt.states = None
    last, final = output.hidden_states[-1], output.last_hidden_state
    # Most decoders return the last one twice; some do more to it before they return it.
    is_final = states[0] is not None and last is not None and last.dim() == final.dim()
    whole = [*states, final if is_final else None]
    return tuple(
        packed if packed is None else layout.unpack(packed, dim=-2) if own is None else own
        for own, layout, packed in zip(whole, layouts, output.hidden_states, strict=True)
    )


def _wrap(prompt: Prompt) -> None:
    """Wrap the layers of a cache that was filled before, so that they can tell its entries from those that come."""
    labels = torch.arange(prompt.base, device=prompt.device).expand(len(prompt.visual), -1)
    for number, layer in attention_layers(prompt.cache).items():
        if not isinstance(layer, PrunedLayer):
            none = labels.new_zeros(len(labels))
            prompt.cache.layers[number] = PrunedLayer(layer, prompt.base, labels, prompt.is_reindexed, none)


def _label(prompt: Prompt, cache: Any) -> None:
    """Tell the layers of a cache what the entries of the prompt stand for; a whole prompt needs no such thing."""
    total = prompt.base + prompt.length
    if not prompt.base and all(layout.is_whole for layout in prompt.layouts) and prompt.new_labels(0)[2]:
        return
    pairs: dict[tuple[int, int], int] = {}
    for number, layer in attention_layers(cache).items():
        group = prompt.groups[number]
        _, labels, is_full = prompt.new_labels(group)
        if isinstance(layer, PrunedLayer):
            layer.relabel(labels, total, is_full)
            layer.reindex, layer.delta = prompt.is_reindexed, prompt.delta
        else:
            layer = cache.layers[number] = PrunedLayer(layer, total, labels, prompt.is_reindexed, prompt.delta)
            layer.is_full = is_full
        layer.group = pairs.setdefault((layer.group, group), len(pairs))


def make_report(prompt: Prompt, cache: Any) -> Report:
    """Say what was done, after the prompt has run."""
    rows = prompt.rows_of_pictures()
    layers = {} if cache is None else attention_layers(cache)
    relevance: list[list[RelevanceRecord]] = [[] for _ in rows]
    for index, records in sorted(prompt.recorded.items()):
        for row, alpha_tv, alpha_vt, dropped in records:
            if rows[row]:
                relevance[row].append(RelevanceRecord(index + 1, alpha_tv, alpha_vt, dropped))
    return Report(
        images=True,
        visual_tokens=[[prompt.pictures[number].length for number in row] for row in rows],
        kept_tokens=[[len(prompt.picks[number]) for number in row] for row in rows],
        keep_indices=[[prompt.picks[number] for number in row] for row in rows],
        grids=[[prompt.grid_of(prompt.pictures[number]) for number in row] for row in rows],
        tokens_per_layer=torch.stack([prompt.counts[group] for group in prompt.groups], dim=1),
        kv_entries=[
            layer.entries if isinstance(layer, PrunedLayer) else layer.get_seq_length() for layer in layers.values()
        ],
        kv_bytes=bytes_held(cache),
        relevance=relevance,
    )
