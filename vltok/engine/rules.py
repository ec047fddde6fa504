"""What a decoder rule sees of a prompt at one layer, and what is remembered of its decisions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vltok.engine.answers import prompt_text, whole_prompt
from vltok.engine.attention import Attending, decoder_attention
from vltok.engine.layout import Layout
from vltok.engine.picking import coordinates_of
from vltok.engine.prompt import Prompt
from vltok.tokens import Grid3
from vltok.visual import Entry

if TYPE_CHECKING:
    from vltok.engine.features import Encoding
    from vltok.engine.pictures import Picture

Record = tuple[int, float, float, bool]  # batch row, both attention ratios, whether all visual tokens left


class State:
    """A prompt at one decoder layer: one row for each of its N samples, which are batch rows unless rows are packed.

    See `vltok.visual.DecoderState` for what a rule sees of it.

    Attributes:
        records: What the rule said of its decisions.
    """

    def __init__(self, prompt: Prompt, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.layer, self.num_layers = index + 1, len(prompt.groups)
        self._prompt, self._index, self._run = prompt, index, (module, args, kwargs)
        self._layout = prompt.layouts[prompt.groups[index]]
        self._rows = torch.arange(len(prompt.visual), device=prompt.device)  # the batch row of each sample
        self._numbers: torch.Tensor | None = None  # and which of its packed samples it is
        samples = prompt.samples()
        if samples is not None:
            counts = samples[:, -1] + 1
            self._rows = self._rows.repeat_interleave(counts)
            self._numbers = torch.cat([torch.arange(count, device=prompt.device) for count in counts.tolist()])
        self.records: list[Record] = []

    # What stands in which slot

    @cached_property
    def is_visual(self) -> torch.Tensor:
        """Which of the S slots hold visual tokens of the sample, (N, S), bool."""
        return self._held(self._layout, self._prompt.visual)

    @cached_property
    def is_text(self) -> torch.Tensor:
        """Which hold text of the sample's prompt behind its first visual token, (N, S), bool."""
        return self._held(self._layout, prompt_text(self._prompt))

    @cached_property
    def last(self) -> torch.Tensor:
        """The slot of the last token of each sample's prompt, (N,), int64."""
        asked = self._held(self._layout, whole_prompt(self._prompt))
        return (asked * torch.arange(asked.shape[1], device=asked.device)).amax(1)

    @cached_property
    def images(self) -> torch.Tensor:
        """The image of its row that a slot's visual token is of, counted from 0, (N, S), int64; -1 for others."""
        numbers = [torch.arange(len(own)) for own in self._pictures]
        return self._of_tokens(numbers).masked_fill(~self.is_visual, -1)

    @cached_property
    def image_lengths(self) -> list[list[int]]:
        """Visual tokens of each of these images that entered the decoder."""
        return self._by_sample([[len(self._prompt.picks[number]) for number in own] for own in self._numbered])

    @cached_property
    def grids(self) -> list[list[Grid3 | None]]:
        """Frames, rows and columns of each of these images before any token left, None where they aren't known."""
        return self._by_sample([[self._prompt.grid_of(picture) for picture in own] for own in self._pictures])

    @cached_property
    def coordinates(self) -> torch.Tensor:
        """Frame, row and column of the visual tokens, (N, S, 3), int64; -1 for others, and where they aren't known."""
        found = torch.full((*self._prompt.visual.shape, 3), -1)
        pictures = [picture for own in self._pictures for picture in own]
        if pictures:
            places = [_places(self._prompt.grid_of(picture), picture.length) for picture in pictures]
            found[self._prompt.visual] = torch.cat(places)
        found = self._layout.pack(found.to(self._prompt.device))[self._rows]
        return found.masked_fill(~self.is_visual.unsqueeze(-1), -1)

    @cached_property
    def entry(self) -> Entry:
        """The prompt as it entered the decoder."""
        first = self._prompt.layouts[0]
        return Entry(
            embeddings=self._prompt.entered[self._rows],
            is_visual=self._held(first, self._prompt.visual),
            is_text=self._held(first, prompt_text(self._prompt)),
            slots=self._layout.within(first)[self._rows],
        )

    # What the layer makes of it

    @property
    def hidden_states(self) -> torch.Tensor:
        """What attention looks at, (N, S, D)."""
        _, args, kwargs = self._run
        return (args[0] if args else kwargs["hidden_states"])[self._rows]

    @property
    def keys(self) -> torch.Tensor:
        """The keys of the layer, (N, S, C), all heads side by side."""
        keys = self._attending.key[:, :, -self._layout.order.shape[1] :]  # those of earlier calls come first
        return keys.transpose(1, 2).flatten(2).to(self._rows.device)[self._rows]

    def attention(self, queries: torch.Tensor) -> torch.Tensor:
        """The attention of queries in these slots, (N, Q), over the slots, (N, Q, S), float32, mean over the heads."""
        seen = self._prompt.sees(self._index, self._rows, queries)
        attention = self._attending.of_queries(self._rows, queries, seen)
        return attention[..., -self._layout.order.shape[1] :].to(self._rows.device)

    @property
    def mass(self) -> torch.Tensor:
        """What share of its attention each token puts on visual and on text tokens, (N, S, 2), float32."""
        columns = self._by_row(torch.stack([self.is_visual, self.is_text], dim=-1))
        before = self._attending.key.shape[2] - columns.shape[1]  # entries of earlier calls belong to neither group
        columns = torch.cat([columns.new_zeros(len(columns), before, 2), columns], dim=1)
        return self._attending.mass(columns).to(self._rows.device)[self._rows]

    def record(self, alpha_tv: torch.Tensor, alpha_vt: torch.Tensor, dropped: torch.Tensor) -> None:
        """Leave both attention ratios and the decision for the report, (N,) each."""
        table = torch.stack([self._rows.float(), alpha_tv.float(), alpha_vt.float(), dropped.float()]).cpu()
        self.records = [(int(row), float(tv), float(vt), bool(gone)) for row, tv, vt, gone in table.T]

    def leaving(self, keep: torch.Tensor) -> torch.Tensor:
        """Where the visual tokens are that a rule doesn't keep, (B, T), bool, on the CPU. `keep` is (N, S), bool."""
        slots = self._by_row(self.is_visual & ~keep.to(self.is_visual.device))
        return self._layout.unpack(slots).cpu() & self._prompt.visual & self._prompt.keep

    @cached_property
    def _attending(self) -> Attending:
        past = self._prompt.past(self._index)
        return decoder_attention(*self._run, None if past is None or past.seen is None else past)

    @cached_property
    def _numbered(self) -> list[list[int]]:
        return self._prompt.rows_of_pictures()

    @cached_property
    def _pictures(self) -> list[list[Picture]]:
        """The pictures of each batch row."""
        return [[self._prompt.pictures[number] for number in own] for own in self._numbered]

    def _by_sample(self, rows: list[Any]) -> list[Any]:
        return [rows[row] for row in self._rows.tolist()]

    def _of_tokens(self, values: list[torch.Tensor]) -> torch.Tensor:
        """A value of each picture of each batch row, for the slots of its tokens, (N, S)."""
        found = torch.zeros(self._prompt.visual.shape, dtype=torch.int64)
        lengths = [torch.tensor([picture.length for picture in own], dtype=torch.int64) for own in self._pictures]
        each = [value.repeat_interleave(length) for value, length in zip(values, lengths, strict=True)]
        found[self._prompt.visual] = torch.cat(each)
        return self._layout.pack(found.to(self._prompt.device))[self._rows]

    def _held(self, layout: Layout, tokens: torch.Tensor) -> torch.Tensor:
        """Which slots of a layout hold some tokens, (B, T), bool, if they are of the sample, (N, P), bool."""
        held = (layout.pack(tokens.to(self._prompt.device)) & layout.real)[self._rows]
        if self._numbers is None:
            return held
        return held & (layout.pack(self._prompt.samples())[self._rows] == self._numbers.unsqueeze(1))

    def _by_row(self, masks: torch.Tensor) -> torch.Tensor:
        """Put the samples of a row together, (N, ...) -> (B, ...), bool."""
        rows = masks.new_zeros(len(self._prompt.visual), *masks.shape[1:], dtype=torch.uint8)
        return rows.index_add(0, self._rows, masks.to(torch.uint8)).bool()


def _places(grid: Grid3 | None, length: int) -> torch.Tensor:
    return torch.full((length, 3), -1) if grid is None else coordinates_of(grid, length)


# `generate` without a cache sends a prompt again with every word. What was decided on the prompt stays decided.


def remember(prompt: Prompt) -> None:
    """Note what was decided on the rows of a prompt that ran without a cache, with its encoded pictures."""
    for row, (encoding, key) in enumerate(_keys(prompt, prompt.length)):
        if encoding is not None:
            own = {
                index: (gone[row], [record[1:] for record in prompt.recorded[index] if record[0] == row])
                for index, gone in prompt.decisions.items()
            }
            encoding.decide(key, own)


def recall(prompt: Prompt) -> dict[int, tuple[torch.Tensor, list[Record]]]:
    """What was decided on the prompt that this one continues by a word, by layer; empty if it is another one."""
    if prompt.cache is not None or prompt.samples() is not None or prompt.hints.labels is not None:
        return {}
    keys = _keys(prompt, prompt.length - 1)
    known = [None if encoding is None else encoding.decisions.get(key) for encoding, key in keys]
    rows = prompt.rows_of_pictures()
    if any(pictures and (own is None or own.keys() != prompt.read) for own, pictures in zip(known, rows, strict=True)):
        return {}
    remembered: dict[int, tuple[torch.Tensor, list[Record]]] = {}
    for index in prompt.read:
        gone, records = torch.zeros_like(prompt.visual), []
        for row, own in enumerate(known):
            if own is not None:
                gone[row, :-1] = own[index][0]
                records += [(row, *record) for record in own[index][1]]
        remembered[index] = gone & prompt.keep, records
    return remembered if any(rows) else {}


def _keys(prompt: Prompt, length: int) -> list[tuple[Encoding | None, Any]]:
    """For each row, where what was decided on it is kept, and under which key: its pictures and first words."""
    keys: list[tuple[Encoding | None, Any]] = []
    for row, numbers in enumerate(prompt.rows_of_pictures()):
        pictures = [prompt.pictures[number] for number in numbers]
        encoding = pictures[0].encoding if pictures else None
        if encoding is None or prompt.ids is None or any(each.encoding is not encoding for each in pictures):
            keys.append((None, None))
        else:
            words = tuple(prompt.ids[row, :length].tolist())
            keys.append((encoding, (prompt.rule, tuple((each.offset, each.length) for each in pictures), words)))
    return keys
