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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.attention import TowerReader, unreadable
from vltok.engine.cache import check_cache, is_pruned
from vltok.engine.call import Call, Continuation, Hints, Prompt
from vltok.engine.decoder import after_attention, after_decoder, before_decoder, before_layer
from vltok.engine.features import (
    KEYWORD,
    Encoder,
    Encoding,
    Found,
    Picture,
    Recent,
    Tape,
    entries_of,
    find_pictures,
    record_of,
)
from vltok.engine.masks import seen_by_any
from vltok.engine.names import cache_in
from vltok.engine.parts import attention_of
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.report import Report
from vltok.run import Run
from vltok.views import AttentionRequest, TokenRule, TokenSelector

ENCODE = "get_image_features"


class PruningEngine:
    """Hooks of one model that prune its visual tokens."""

    def __init__(self, family: Any, model: nn.Module, edits: Edits, run: Run) -> None:
        self.family = family
        self.model = model
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
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def install(self, head: nn.Module | None) -> None:
        """Hook the model, the head around it if there is one, and its decoder."""
        if head is not None:
            self.edits.before(head, before_head)
        self.edits.before(self.model, self.before_model)
        self.edits.after(self.model, self.after_model)
        self.follow()

    def use_selector(self, selector: TokenSelector) -> None:
        """Let `selector` prune at the entry of the language model."""
        if self.selector is not None:
            raise ValueError(f"{type(self.selector).__name__} already selects visual tokens here; give one selector")
        self._check_positions(selector)
        self.selector = selector
        self._watch_tower(self.request_of(selector))

    def use_rule(self, rule: TokenRule) -> None:
        """Let `rule` drop visual tokens inside the decoder."""
        if self.rule is not None:
            raise ValueError(f"{type(self.rule).__name__} already drops visual tokens in this decoder; give one")
        layers = self.family.decoder(self.model).layers
        for layer in rule.layers(len(layers)):
            attention = attention_of(layers[layer - 1])
            if attention is None or not hasattr(attention, "config"):
                raise unreadable(layers[layer - 1] if attention is None else attention)
        self.rule = rule
        self.follow()

    def _check_positions(self, selector: TokenSelector) -> None:
        if selector.positions == "reindex" and self.family.multi_axis_positions:
            raise ValueError(
                f"{self.family.title} gives visual tokens positions on several axes, which can't be counted anew; "
                'use positions="keep"'
            )

    def request_of(self, selector: TokenSelector) -> AttentionRequest | None:
        """The attention in the vision tower that a selector wants."""
        return selector.attention_request(self.has_cls)

    # Modules are found when the model is called: others may have wrapped or replaced them since the last time

    def follow(self) -> None:
        """Hook the decoder, its layers and what encodes pictures, where that has not been done."""
        if not isinstance(encode := vars(self.model).get(ENCODE), Encoder) or encode.tape is not self.tape:
            with self._lock:
                encoder = Encoder(self.tape, self.recent, self.begin_encoding, self.describe)
                self.edits.wrap_method(self.model, ENCODE, encoder)
        decoder = self.family.decoder(self.model)
        self._hook("decoder", decoder, (before_decoder, after_decoder))
        rule = self.rule
        watched = () if rule is None else self.run.current(rule).layers(len(decoder.layers))
        for index, layer in enumerate(decoder.layers):
            self._hook(f"layer {index}", layer, (partial(before_layer, index), None))
            if index + 1 in watched:
                attention = attention_of(layer)
                if attention is None:
                    raise unreadable(layer)
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

    def _watch_tower(self, request: AttentionRequest | None) -> None:
        if request is None:
            return
        attention, read = self.family.attention_module(self.model, request), self.family.read_attention
        with self._lock:
            hooks = attention._forward_pre_hooks.values()
            readers = [getattr(hook, "__self__", None) for hook in hooks]
            if not any(isinstance(r, TowerReader) and r.tape is self.tape and r.request == request for r in readers):
                self.edits.before(attention, TowerReader(self.tape, request, read).see)

    # Encoding

    def begin_encoding(self) -> AttentionRequest | None:
        """Pictures are about to be encoded: see to it that the wanted attention is read."""
        request = None if self.selector is None else self.request_of(self.run.current(self.selector))
        self._watch_tower(request)
        return request

    def describe(self, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        """A number from the pixels of each entry of the features, (entries,)."""
        return self.family.pixel_keys(self.model, encoding, pixels)

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
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise UnsupportedInputError("visual tokens of videos can't be pruned yet; remove the handle to run videos")
        cache = cache_in(kwargs)
        pruned = is_pruned(cache)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if kwargs.get("pixel_values") is not None or encoded.get("image") is not None:
            call = self._open_prompt(kwargs, hints, encoded.get("image"))
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

    def _open_prompt(self, kwargs: dict, hints: Hints | None, encoded: Any) -> Prompt:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None:
            visual = torch.isin(ids, torch.tensor(self.family.marks(self.model), device=ids.device))
        else:
            table = self.model.get_input_embeddings()
            rows = table(torch.tensor(self.family.marks(self.model), device=embeds.device))
            visual = (embeds.unsqueeze(-2) == rows).all(-1).any(-1)
        prompt = self._prompt(kwargs, hints, visual)
        prompt.encoded = encoded
        return prompt

    def _open_merged(self, kwargs: dict, hints: Hints | None, embeds: torch.Tensor) -> Prompt | None:
        """A prompt whose pictures the caller encoded and merged into the embeddings, or None if it has none."""
        found = self.recent.find(embeds)
        if not any(found):
            return None
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        pictures: list[Picture] = []
        start = 0
        for row, entries in enumerate(found):
            end = None  # of the last picture of this row, which a further tile may go on
            for each in entries:
                length = each.length
                visual[row, each.position : each.position + length] = True
                last = pictures[-1] if pictures else None
                goes_on = self.family.unit == "run" and end == each.position and last.encoding is each.encoding
                if goes_on and last.entries.stop == each.entry:
                    tiles = range(last.entries.start, each.entry + 1)
                    pictures[-1] = Picture(row, last.start, last.length + length, each.encoding, tiles)
                else:
                    pictures.append(Picture(row, start, length, each.encoding, range(each.entry, each.entry + 1)))
                start, end = start + length, each.position + length
        prompt = self._prompt(kwargs, hints, visual)
        prompt.pictures = pictures
        return prompt

    def _prompt(self, kwargs: dict, hints: Hints | None, visual: torch.Tensor) -> Prompt:
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        check_cache(cache)
        base = 0 if cache is None else cache.get_seq_length()
        attended = call_attends(mask, visual, base)
        visual, attended = torch.stack([visual, attended]).cpu()
        if (visual & ~attended).any():
            raise UnsupportedInputError("attention_mask hides image placeholders; it may hide padding only")
        prompt = Prompt(
            self, self.model, cache, base, mask, kwargs.get("input_ids"), visual, attended, hints or Hints()
        )
        prompt.selector = None if self.selector is None else self.run.current(self.selector)
        prompt.rule = None if self.rule is None else self.run.current(self.rule)
        if prompt.selector is not None:
            self._check_positions(prompt.selector)
        return prompt

    def find_pictures(self, prompt: Prompt) -> None:
        """Say which encoded entries are the pictures of a prompt; leaves them in the prompt.

        Raises:
            UnsupportedInputError: If they don't fit its placeholders, or nothing is known of them.
        """
        if prompt.pictures:
            return
        entries, sources = None, None
        if prompt.encoded is not None:
            prompt.encoding = record_of(prompt.encoded)
            entries = entries_of(prompt.encoded)
            if prompt.encoding is not None and entries is not None:
                given, known = sum(map(len, entries)), sum(prompt.encoding.lengths)
                if known == 0 or given % known:  # somebody cut them since
                    prompt.encoding = None
        encoding = prompt.encoding
        if encoding is None:
            sources = self._recognise(entries)
        if sources is not None:
            lengths = [each.length for each in sources]
        else:
            lengths = [len(entry) for entry in entries] if encoding is None else encoding.lengths
        for repeat in (n for n in range(1, len(prompt.visual) + 1) if len(prompt.visual) % n == 0):
            rows = prompt.visual[::repeat]
            if torch.equal(rows.repeat_interleave(repeat, 0), prompt.visual):
                pictures = find_pictures(self.family.unit, encoding, lengths, rows)
                if pictures is not None:
                    prompt.pictures = [_trace(each, sources) if sources else each for each in pictures]
                    prompt.repeat = repeat
                    return
        raise UnsupportedInputError(
            f"the prompts have {prompt.visual.sum(1).tolist()} image placeholders, which don't fit the encoded images, "
            f"of {lengths} tokens; pass the images of these very prompts. With prefill_chunk_size, a chunk may not cut "
            "an image: use a larger one, or None"
        )

    def _recognise(self, entries: list[torch.Tensor] | None) -> list[Found] | None:
        """Where features that lost their record come from, seen by their rows; None if they were never seen."""
        if not entries:
            raise UnsupportedInputError(
                "the images of this prompt were not encoded by the model while the method was on it, and their "
                "features are not to be seen; pass pixel_values"
            )
        features = torch.cat(entries)
        found = self.recent.find(features.unsqueeze(0))[0]
        if not found and not self.recent.knows_any(features):
            return None
        if sum(each.length for each in found) != len(features):
            raise UnsupportedInputError(
                "the encoded images of this prompt were cut, so that some are there in part only. prefill_chunk_size "
                "does that: use a chunk size with which no image is cut, or None"
            )
        return found


def _trace(picture: Picture, sources: list[Found]) -> Picture:
    """A picture made of features that were found again, with what is known of these."""
    own = sources[picture.entries.start : picture.entries.stop]
    entries = range(own[0].entry, own[0].entry + len(own))
    is_one = all(each.encoding is own[0].encoding for each in own) and [each.entry for each in own] == list(entries)
    return replace(picture, encoding=own[0].encoding if is_one else None, entries=entries)


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


def call_attends(mask: Any, visual: torch.Tensor, base: int) -> torch.Tensor:
    """What is no padding among the tokens that came, (B, T), bool, where `visual` is."""
    length = visual.shape[1]
    maps = [mask] if isinstance(mask, torch.Tensor) else list(mask.values()) if isinstance(mask, dict) else []
    maps = [each for each in maps if isinstance(each, torch.Tensor)]
    if not maps:
        return torch.ones_like(visual)
    if maps[0].dim() == 2:
        attended = maps[0][:, base:].bool()
        if attended.shape[1] != length:
            return torch.ones_like(visual)  # the call says what is wrong
    elif maps[0].dim() == 4:
        attended = torch.stack([seen_by_any(each, length).expand_as(visual) for each in maps]).any(0)
    else:
        raise UnsupportedInputError(
            f"attention_mask must be (batch, length) or ready-made maps (batch, 1, length, length), got "
            f"{tuple(maps[0].shape)}"
        )
    return attended.to(visual.device).expand_as(visual)


def _has(module: nn.Module, hooks: tuple[Any, Any]) -> bool:
    """Whether a module has one of these hooks: functions, perhaps with a layer's number, so copies are equal."""
    wanted = {_mark(hook) for hook in hooks if hook is not None}
    present = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(_mark(hook) in wanted for hook in present)


def _mark(hook: Any) -> Any:
    return (hook.func, hook.args) if isinstance(hook, partial) else hook
