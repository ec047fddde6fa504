"""The pruning engine: carries out what selectors and decoder rules decide, on embeddings, masks, positions and caches.

One engine sits on one model. It holds no state of a call: a `Call` is made when the model is entered and travels to the
decoder and its layers as a keyword, so threads, nested calls and broken-off ones don't meet.

    head     labels, guesses ---+
    model    what came: prompt with images, or tokens on a pruned cache? ---> Call
    decoder  entry: pick, pack; layers: mask, rotary rows, drops; exit: back to the places of the prompt
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.attention import unreadable
from vltok.engine.cache import check_cache, is_pruned
from vltok.engine.call import Call, Continuation, Hints
from vltok.engine.decoder import after_attention, after_decoder, before_decoder, before_layer
from vltok.engine.features import ENCODERS, KEYWORD, KINDS, PIXELS, Answering, Encoder, Encoding, Recent, Tape, Wanted
from vltok.engine.masks import seen_by_any, stores_of
from vltok.engine.names import ENCODES_ONCE, cache_in
from vltok.engine.parts import attention_of, layers_read
from vltok.engine.pictures import sources_in
from vltok.engine.prompt import Prompt
from vltok.engine.question import turn_of
from vltok.engine.text_tower import HOW, TextTower
from vltok.engine.tower_attention import FeatureReader, TowerReader
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.report import Report
from vltok.run import Run
from vltok.visual import TokenRule, TokenSelector


class PruningEngine:
    """Hooks of one model that prune its visual tokens."""

    def __init__(
        self,
        family: Any,
        model: nn.Module,
        processor: Any,
        text_tower: TextTower | None,
        edits: Edits,
        run: Run,
    ) -> None:
        self.family = family
        self.model = model
        self.processor = processor
        self.text_tower = text_tower
        self.turn = None if processor is None else turn_of(processor)
        self.edits = edits
        self.run = run
        self.selector: TokenSelector | None = None
        self.rule: TokenRule | None = None
        self.has_cls = family.has_cls(model)
        self.tape = Tape()
        self.recent = Recent()
        self._hooked: dict[str, nn.Module] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"} | {"processor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def install(self, head: nn.Module | None) -> None:
        """Hook the model, the head around it if there is one, and its decoder."""
        if head is not None:
            self.edits.before(head, before_head)
            if not ENCODES_ONCE and hasattr(head, "generate"):
                self.edits.wrap_method(head, "generate", Answering(self.tape))
        self.edits.before(self.model, self.before_model)
        self.edits.after(self.model, self.after_model)
        self.follow()

    def use_selector(self, selector: TokenSelector) -> None:
        """Let `selector` prune at the entry of the language model."""
        if self.selector is not None:
            raise ValueError(f"{type(self.selector).__name__} already selects visual tokens here; give one selector")
        self._check_positions(selector)
        self._check_text_tower(selector)
        self._watch_tower(self.wanted_by(selector))
        self.selector = selector

    def use_rule(self, rule: TokenRule) -> None:
        """Let `rule` drop visual tokens inside the decoder."""
        if self.rule is not None:
            raise ValueError(f"{type(self.rule).__name__} already drops visual tokens in this decoder; give one")
        decoder = self.family.decoder(self.model)
        for index in layers_read(rule, decoder):
            attention = _readable(decoder.layers[index])
            if not hasattr(attention, "config"):
                raise unreadable(attention)
            stores = stores_of(decoder.config, len(decoder.layers))
            shared = [(layer, store) for layer, store in enumerate(stores) if store <= index < layer]
            if shared:
                first = min(store for _, store in shared)
                raise UnsupportedModelError(
                    f"layer {shared[0][0] + 1} of this decoder takes the keys of layer {shared[0][1] + 1}, so visual "
                    f"tokens that leave after layer {index + 1} would still be seen there; "
                    + (f"drop them after layer {first} at the latest (smaller depth or layer), or " if first else "")
                    + "use a method that prunes before the decoder (for ToDRE relevance=False)"
                )
        self.rule = rule
        self.follow()

    def _check_positions(self, selector: TokenSelector) -> None:
        if selector.positions != "keep" and self.family.has_axes(self.model):
            raise ValueError(
                f"{self.family.title} gives visual tokens positions on several axes, which can't be counted anew; "
                'use positions="keep"'
            )

    def _check_text_tower(self, selector: TokenSelector) -> None:
        if "clip" not in selector.needs:
            return
        name = type(selector).__name__
        if self.text_tower is None:
            raise ValueError(
                f"{name} compares visual tokens with the question in CLIP's space, so it needs a CLIP model and its "
                f"tokenizer: {HOW}; vltok.load() takes text_tower=, too"
            )
        if getattr(selector, "text", None) is None and self.text_tower.prompt_tokenizer is None:
            raise ValueError(
                f"{name} needs the processor, whose tokenizer knows the words of the question: {HOW}; or give the "
                "question as text="
            )
        for tower in self.family.towers(self.model):
            self.text_tower.check_tower(tower, self.model.config)

    def wanted_by(self, selector: TokenSelector) -> Wanted | None:
        """What a selector wants to know of the vision tower, or None."""
        request = selector.attention_request(self.has_cls)
        keys, features = "keys" in selector.needs, bool({"features", "clip"} & {*selector.needs})
        if keys and request is None:
            raise ValueError(
                f"{type(selector).__name__} needs keys and doesn't say of which layer; its attention_request() must"
            )
        return Wanted(request, keys, features, selector.merges) if request is not None or features else None

    # Modules are found when the model is called: others may have wrapped or replaced them since the last time

    def follow(self) -> None:
        """Hook the decoder, its layers and what encodes pictures, where that has not been done."""
        for kind, name in ENCODERS.items():
            encode = vars(self.model).get(name)
            is_ours = isinstance(encode, Encoder) and encode.tape is self.tape
            if not is_ours and hasattr(type(self.model), name):
                with self._lock:
                    encoder = Encoder(kind, self.tape, self.recent, self.begin_encoding, self.describe)
                    self.edits.wrap_method(self.model, name, encoder)
        decoder = self.family.decoder(self.model)
        self._hook("decoder", decoder, (before_decoder, after_decoder))
        rule = self.rule
        watched = () if rule is None else layers_read(self.run.current(rule), decoder)
        for index, layer in enumerate(decoder.layers):
            self._hook(f"layer {index}", layer, (partial(before_layer, index), None))
            if index in watched:
                attention = _readable(layer)
                self._hook(f"attention {index}", attention, (None, partial(after_attention, index)))

    def _hook(self, place: str, module: nn.Module, hooks: tuple[Any, Any]) -> None:
        known = self._hooked.get(place)
        if known is module:
            return
        with self._lock:
            # A wrapper around what is hooked already, or a copy of it inside, carries the hooks along.
            if self._hooked.get(place) is module or any(_has(part, hooks) for part in module.modules()):
                self._hooked[place] = module
                return
            before, after = hooks
            if before is not None:
                self.edits.before(module, before)
            if after is not None:
                self.edits.after(module, after)
            self._hooked[place] = module

    def _watch_tower(self, wanted: Wanted | None) -> None:
        if wanted is None:
            return
        request = wanted.attention
        with self._lock:
            for attention in [] if request is None else self.family.attention_modules(self.model, request):
                known = _readers(attention._forward_pre_hooks, TowerReader, self.tape)
                if request not in [each.request for each in known]:
                    self.edits.before(attention, TowerReader(self.tape, request).see)
            if wanted.features:
                projector = self.family.projector(self.model)
                reader = FeatureReader(self.tape)
                places = self.family.feature_blocks(self.model) if projector is None else [projector]
                for module in places:
                    if not _readers(module._forward_hooks, FeatureReader, self.tape):
                        self.edits.after(module, reader.after_block if projector is None else reader.after_projector)

    # Encoding

    def begin_encoding(self) -> Wanted | None:
        """Pictures are about to be encoded: see to it that what is wanted is read."""
        wanted = None if self.selector is None else self.wanted_by(self.run.current(self.selector))
        self._watch_tower(wanted)
        return wanted

    def describe(self, encoding: Encoding, pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Numbers made from the pixels, (n,) on the CPU, and how many visual tokens each is about."""
        keys = self.family.pixel_keys(self.model, encoding, pixels).cpu()
        total = sum(encoding.lengths)
        if len(keys) == len(encoding.lengths) and self.family.unit != "row":  # rows hold several, of equal length
            return keys, encoding.lengths
        if len(keys) and total % len(keys) == 0:
            return keys, [total // len(keys)] * len(keys)
        return keys.sum(0, keepdim=True), [total]

    # The call

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Tell a prompt with images from a continuation and from plain text."""
        if not len(self.edits):  # the handle was removed while this call was held back
            return None
        kwargs = bind(module, args, kwargs)
        if getattr(module, "_is_replica", False):
            raise UnsupportedInputError(
                "nn.DataParallel copies the model for every call without its methods; use DistributedDataParallel"
            )
        hints = kwargs.pop(KEYWORD, None)
        encoded = {kind: output for kind, output in (kwargs.get("mm_encoder_outputs") or {}).items() if kind in KINDS}
        encoded = {kind: output for kind, output in encoded.items() if output is not None}
        pixels = [name for name, value in kwargs.items() if PIXELS in name and value is not None]
        awaited = [kind for kind in KINDS if any(name.endswith("_videos") == (kind == "video") for name in pixels)]
        cache = cache_in(kwargs)
        pruned = is_pruned(cache)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if awaited or encoded:
            call = self._open_prompt(kwargs, hints, encoded, awaited)
        elif pruned:
            tokens = ids if ids is not None else embeds
            call = Continuation(cache, tokens, kwargs.get("attention_mask"))
            kwargs["position_ids"] = call.place(kwargs.get("position_ids"))
        else:
            call = self._open_merged(kwargs, hints, embeds) if ids is None and embeds is not None else None
            if call is None and (cache is None or cache.get_seq_length() == 0):
                self.run.report("pruning", Report(images=False))
        if call is None:
            return (), kwargs
        self.follow()
        if isinstance(call, Prompt):
            call.outer = self.tape.waiting
            self.tape.waiting = weakref.ref(call)
        return (), {**kwargs, KEYWORD: call}

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """See to it that the language model met the call."""
        call = kwargs.get(KEYWORD)
        if isinstance(call, Call) and output is not None and not call.has_entered:
            raise UnsupportedModelError(
                f"{type(module).__name__} hands no keyword arguments to its language model, by which vltok tells it "
                "what was pruned; remove the handle"
            )

    def _open_prompt(self, kwargs: dict, hints: Hints | None, encoded: dict[str, Any], awaited: list[str]) -> Prompt:
        """A prompt whose pictures the model encodes, or merges as they were encoded before."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        kinds = torch.zeros(tokens.shape[:2], dtype=torch.int8, device=tokens.device)
        for kind, mark in reversed(self.family.marks(self.model).items()):
            if ids is not None:
                found = ids == mark
            else:
                row = self.model.get_input_embeddings()(torch.tensor(mark, device=embeds.device))
                found = (embeds == row).all(-1)
            kinds[found] = 1 + KINDS.index(kind)
        prompt = self._prompt(kwargs, hints, kinds)
        prompt.encoded, prompt.awaited = encoded, awaited
        masks = {kind: kwargs.get(f"{kind}_compression_mask") for kind in KINDS}
        prompt.thinned = {kind: mask for kind, mask in masks.items() if mask is not None}
        return prompt

    def _open_merged(self, kwargs: dict, hints: Hints | None, embeds: torch.Tensor) -> Prompt | None:
        """A prompt whose pictures the caller encoded and merged into the embeddings, or None if it has none."""
        sources, kinds = sources_in(embeds, self.recent)
        if not sources:
            return None
        prompt = self._prompt(kwargs, hints, kinds.to(embeds.device))
        prompt.sources = sources
        return prompt

    def _prompt(self, kwargs: dict, hints: Hints | None, kinds: torch.Tensor) -> Prompt:
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        check_cache(cache)
        base = 0 if cache is None else cache.get_seq_length()
        attended = call_attends(mask, kinds, base)
        kinds, attended = torch.stack([kinds, attended.to(kinds.dtype)]).cpu()
        if ((kinds > 0) & (attended == 0)).any():
            raise UnsupportedInputError("attention_mask hides image placeholders; it may hide padding only")
        ids = kwargs.get("input_ids")
        prompt = Prompt(self, self.model, cache, base, mask, ids, kinds, attended.bool(), hints or Hints())
        prompt.selector = None if self.selector is None else self.run.current(self.selector)
        prompt.rule = None if self.rule is None else self.run.current(self.rule)
        if prompt.selector is not None:
            self._check_positions(prompt.selector)
            self._check_text_tower(prompt.selector)
        return prompt


def before_head(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Tell the model under a head where answers and guesses begin."""
    kwargs = bind(module, args, kwargs)
    labels, wanted = kwargs.get("labels"), kwargs.get("logits_to_keep")
    # generate() makes the cache before the first call; with a draft model it then asks for the logits of all guesses.
    guesses = wanted - 1 if isinstance(wanted, int) and wanted > 1 and cache_in(kwargs) is not None else 0
    if labels is not None or guesses:
        kwargs[KEYWORD] = Hints(labels, guesses)
    return (), kwargs


def bind(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a forward by keyword."""
    kwargs = dict(kwargs)
    if args:
        kwargs.update(zip(inspect.signature(module.forward).parameters, args, strict=False))
    return kwargs


def call_attends(mask: Any, kinds: torch.Tensor, base: int) -> torch.Tensor:
    """What is no padding among the tokens that came, (B, T), bool, beside their `kinds`, (B, T).

    Raises:
        UnsupportedInputError: If the mask is of a shape that says nothing of them.
    """
    everything = torch.ones_like(kinds, dtype=torch.bool)
    maps = [mask] if isinstance(mask, torch.Tensor) else list(mask.values()) if isinstance(mask, dict) else []
    maps = [each for each in maps if isinstance(each, torch.Tensor)]
    if not maps:
        return everything
    if maps[0].dim() == 2:
        attended = maps[0][:, base:].bool()
        if attended.shape[1] != kinds.shape[1]:
            return everything  # the call says what is wrong
    elif maps[0].dim() == 4:
        attended = torch.stack([seen_by_any(each, kinds.shape[1]).expand_as(kinds) for each in maps]).any(0)
    else:
        raise UnsupportedInputError(
            f"attention_mask must be (batch, length) or ready-made maps (batch, 1, length, length), got "
            f"{tuple(maps[0].shape)}"
        )
    return attended.to(kinds.device).expand_as(kinds)


def _readers(hooks: Mapping[int, Any], kind: type, tape: Tape) -> list[Any]:
    """The readers of a kind among a module's hooks that read for an engine, known by its tape."""
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, kind) and owner.tape is tape]


def _readable(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer, which a rule is about to read."""
    attention = attention_of(layer)
    if attention is None:
        raise unreadable(layer)
    if getattr(attention, "indexer", None) is not None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} leaves keys out by an indexer of its own before it attends, so its attention "
            "can't be read; methods that prune before the decoder work (for ToDRE relevance=False)"
        )
    return attention


def _has(module: nn.Module, hooks: tuple[Any, Any]) -> bool:
    """Whether a module has one of these hooks: functions, perhaps with a layer's number, so copies are equal."""
    wanted = {_mark(hook) for hook in hooks if hook is not None}
    present = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(_mark(hook) in wanted for hook in present)


def _mark(hook: Any) -> Any:
    return (hook.func, hook.args) if isinstance(hook, partial) else hook
