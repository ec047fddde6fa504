"""An answer unpruned, pruned and from a natively short prompt, measured in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

import vltok
from eval.cost import flops
from eval.cost.parts import PARTS, Sections, watch
from eval.cost.shapes import features
from eval.measure import clock_of, peak_allocated, quartiles, ratio, timed
from vltok.method import Method

UNPRUNED = "unpruned"
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One way to answer.

    Attributes:
        name: Row of the table.
        method: What is put on the model, as text, or None.
        native: Visual tokens of the prompt where it is short by itself, else None.
    """

    name: str
    method: str | None = None
    native: int | None = None


@dataclass(frozen=True)
class Row:
    """What a case costs; times are medians, ratios medians of those within a round.

    Attributes:
        case: Its name.
        visual_tokens: Visual tokens that enter the decoder.
        milliseconds: Of each part, see `PARTS`, and of the "whole" answer measured without hooks.
        per_token: Milliseconds of each decoded token.
        to_unpruned: The whole as a ratio to the unpruned answer: lower quartile, median, upper quartile.
        first_to_unpruned: Tower, projector, selector and prefill as such a ratio, the median.
        to_native: The whole as a ratio to the natively short prompt, quartiles, or None where there is none.
        decode_to_native: The decoded tokens as such a ratio, the median.
        parts_to_whole: All parts together as a ratio to the answer with hooks that they are of.
        hooks_to_whole: The answer with hooks as a ratio to that without.
        kv_bytes: Keys and values of the prompt.
        peak_bytes: The most that is allocated at once until the first token, above weights and inputs.
        flops: Operations, see `eval.cost.flops`, or None where no formula is known.
        full_flops: The same at full size, or None.
    """

    case: str
    visual_tokens: int
    milliseconds: dict[str, float]
    per_token: float
    to_unpruned: tuple[float, float, float]
    first_to_unpruned: float
    to_native: tuple[float, float, float] | None
    decode_to_native: float | None
    parts_to_whole: float
    hooks_to_whole: float
    kv_bytes: int
    peak_bytes: int
    flops: flops.Flops | None
    full_flops: flops.Flops | None


def cases(methods: Sequence[str], budgets: Sequence[float]) -> list[Case]:
    """Every method at every budget, behind the unpruned model; a method that needs none, or has its own, comes once.

    Raises:
        ValueError: If a method or one of its settings isn't known.
    """
    found = [Case(UNPRUNED)]
    for text in methods:
        try:
            Method.from_text(text)
            found.append(Case(text, text))
        except ValueError:
            each = {f"{text} {budget:g}": f"{text},keep_ratio={budget:g}" for budget in budgets}
            found += [Case(name, full) for name, full in each.items() if Method.from_text(full)]
    return found


@dataclass(frozen=True)
class Times:
    """Seconds of a case, round by round: the answer as it is, the answer with hooks, and the parts of the latter."""

    whole: list[float]
    hooked: list[float]
    parts: list[dict[str, float]]

    def of(self, *names: str) -> list[float]:
        """Some parts together."""
        return [sum(each.get(name, 0.0) for name in names) for each in self.parts]


class Bench:
    """A model and a prompt with one image.

    Attributes:
        model: The model.
        ask: Makes the prompt; asked again under each method, as some change how many placeholders an image gets.
        processor: For such methods, or None.
        full: The same model at full size on the meta device, to count operations with, or None.
        new_tokens: Tokens of an answer, at least 2.
    """

    def __init__(
        self,
        model: nn.Module,
        ask: Callable[[], Inputs],
        processor: Any = None,
        full: nn.Module | None = None,
        new_tokens: int = 16,
    ) -> None:
        self.model, self.ask, self.processor, self.full, self.new_tokens = model, ask, processor, full, new_tokens
        self.device = str(model.device)
        self.inputs = ask()

    @contextmanager
    def on(self, case: Case) -> Iterator[vltok.Handle | None]:
        """The model as the case has it."""
        if case.method is None:
            yield None
        else:
            with vltok.apply(self.model, case.method, processor=self.processor) as handle:
                yield handle

    @torch.no_grad()
    def answer(self, case: Case, inputs: Inputs, new_tokens: int | None = None) -> Any:
        """Answer; a natively short prompt has its image encoded as a whole before, as the pruned one does."""
        count = new_tokens or self.new_tokens
        if case.native is not None:
            features(self.model, self.inputs)
        return self.model.generate(
            **inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False, return_dict_in_generate=True
        )

    def native(self, count: int) -> Inputs:
        """A prompt with the same text and the first `count` visual tokens, as embeddings."""
        marks = self._visual(self.inputs)
        keep = ~marks | (marks.cumsum(1) <= count)
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(self.inputs["input_ids"])
            embeds[marks] = torch.cat(features(self.model, self.inputs)).to(embeds)
        short = embeds[keep].unsqueeze(0)
        return {
            "inputs_embeds": short,
            "attention_mask": torch.ones(short.shape[:2], dtype=torch.long).to(short.device),
        }

    def _visual(self, inputs: Inputs) -> torch.Tensor:
        return inputs["input_ids"] == self.model.config.image_token_id

    def measure(self, asked: Sequence[Case], rounds: int, seconds: float) -> list[Row]:
        """Measure all cases in turns, the first of which is unpruned, and natively short prompts beside them."""
        text = int((~self._visual(self.inputs)).sum())
        prompts, tokens, kv, peaks, natives = {}, {}, {}, {}, {}
        every = list(asked)
        for case in every:  # grows while natively short prompts are found
            with self.on(case) as handle:
                prompts[case] = self.ask() if case.native is None else self.native(case.native)
                kv[case] = kv_bytes(self.answer(case, prompts[case], 2))
                report = vltok.Report() if handle is None else handle.report(file=None)
                length = prompts[case]["attention_mask"].shape[1]
                dropped = len(report.tokens_per_layer) > 0
                tokens[case] = report.tokens_per_layer[0].tolist() if dropped else [length] * layers_of(self.model)
                peaks[case] = peak_allocated(lambda case=case: self.answer(case, prompts[case], 1), self.device)
            count = tokens[case][0] - text
            if case.method and len({*tokens[case]}) == 1 and tokens[case][0] < tokens[every[0]][0]:
                natives[case] = Case(f"short prompt, {count} visual", native=count)
                every += [natives[case]] if natives[case] not in every else []
        times = self._time(every, prompts, rounds, seconds)
        return [
            self._row(case, every[0], natives.get(case), tokens[case], text, times, kv[case], peaks[case])
            for case in every
        ]

    def _time(
        self, every: Sequence[Case], prompts: Mapping[Case, Inputs], rounds: int, seconds: float
    ) -> dict[Case, Times]:
        clock = clock_of(self.device)
        parts: dict[Case, list[dict[str, float]]] = {case: [] for case in every}
        sections = Sections(clock)

        def plain(case: Case) -> None:
            self.answer(case, prompts[case])

        def hooked(case: Case) -> None:
            with sections.section("other"):
                self.answer(case, prompts[case])

        @contextmanager
        def around(key: tuple[Case, Callable]) -> Iterator[None]:
            case, run = key
            with self.on(case) as handle:
                gc.collect()
                if run is plain:
                    yield
                    return
                sections.seconds = {}
                with watch(self.model, handle, sections):
                    yield
                parts[case].append(sections.seconds)

        runs = {(case, run): partial(run, case) for case in every for run in (plain, hooked)}
        gc.collect()
        gc.freeze()  # what is here already stays, and needs no look before every answer
        taken = timed(runs, device=self.device, rounds=rounds, seconds=seconds, around=around, clock=clock)
        gc.unfreeze()
        return {case: Times(taken[case, plain], taken[case, hooked], parts[case][1:]) for case in every}

    def _row(
        self,
        case: Case,
        base: Case,
        native: Case | None,
        tokens: list[int],
        text: int,
        times: Mapping[Case, Times],
        kv: int,
        peak: int,
    ) -> Row:
        own = times[case]
        milliseconds = {name: round(statistics.median(own.of(name)) * 1e3, 3) for name in PARTS}
        known = self.model.config.model_type in flops.KNOWN and (case.method is None or prunes(case.method))
        scales = known and self.full is not None and len(set(tokens)) == 1
        return Row(
            case=case.name,
            visual_tokens=tokens[0] - text,
            milliseconds=milliseconds | {"whole": round(statistics.median(own.whole) * 1e3, 3)},
            per_token=round(milliseconds["decode"] / (self.new_tokens - 1), 3),
            to_unpruned=quartiles(own.whole, times[base].whole),
            first_to_unpruned=ratio(own.of(*PARTS[:4]), times[base].of(*PARTS[:4])),
            to_native=None if native is None else quartiles(own.whole, times[native].whole),
            decode_to_native=None if native is None else ratio(own.of("decode"), times[native].of("decode")),
            parts_to_whole=ratio(own.of(*PARTS), own.hooked),
            hooks_to_whole=ratio(own.hooked, own.whole),
            kv_bytes=kv,
            peak_bytes=peak,
            flops=flops.count(self.model, self.inputs, tokens) if known else None,
            full_flops=flops.count(self.full, self.inputs, tokens[:1] * layers_of(self.full)) if scales else None,
        )


def layers_of(model: nn.Module) -> int:
    """Layers of the decoder."""
    return model.config.get_text_config().num_hidden_layers


def prunes(method: str) -> bool:
    """Whether a method drops tokens and changes nothing else that is counted."""
    return isinstance(Method.from_text(method), vltok.Selector | vltok.DecoderRule)


def kv_bytes(answer: Any) -> int:
    """Bytes of the keys and values in the cache of an answer of two tokens, of which one has entries."""
    cache = next(value for value in answer.values() if isinstance(value, Cache))
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(x[..., :-1, :].numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
