"""What a decoder rule sees of a prompt at one layer, and what is remembered of its decisions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vltok.engine.attention import decoder_mass
from vltok.engine.prompt import Prompt

REMEMBERED = 4096  # prompts about the same encoded pictures
Record = tuple[int, float, float, bool]  # batch row, both attention ratios, whether all visual tokens left


class State:
    """A prompt at one decoder layer: one row for each of its N samples, which are batch rows unless rows are packed.

    Attributes:
        is_visual: Which of the S slots hold visual tokens of the sample, (N, S), bool.
        is_text: Which hold text of the sample's prompt behind its first visual token, (N, S), bool.
        records: What the rule said of its decisions.
    """

    def __init__(self, prompt: Prompt, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._prompt, self._index, self._run = prompt, index, (module, args, kwargs)
        self._layout = prompt.layouts[prompt.groups[index]]
        visual, text = (
            self._layout.pack(mask.to(prompt.device)) & self._layout.real
            for mask in (prompt.visual, prompt_text(prompt))
        )
        self._rows = torch.arange(len(visual), device=prompt.device)  # the batch row of each sample
        samples = prompt.samples()
        own = torch.ones_like(visual)
        if samples is not None:
            counts = samples[:, -1] + 1
            self._rows = self._rows.repeat_interleave(counts)
            numbers = torch.cat([torch.arange(count, device=prompt.device) for count in counts.tolist()])
            own = self._layout.pack(samples)[self._rows] == numbers.unsqueeze(1)
        self.is_visual, self.is_text = visual[self._rows] & own, text[self._rows] & own
        self.records: list[Record] = []

    @property
    def hidden_states(self) -> torch.Tensor:
        """What attention looks at, (N, S, D)."""
        _, args, kwargs = self._run
        return (args[0] if args else kwargs["hidden_states"])[self._rows]

    @property
    def mass(self) -> torch.Tensor:
        """What share of its attention each token puts on visual and on text tokens, (N, S, 2), float32."""
        columns = self._by_row(torch.stack([self.is_visual, self.is_text], dim=-1))
        past = self._prompt.past(self._index)
        past = None if past is None or past.seen is None else past
        if past is not None:  # entries of earlier calls belong to neither group
            before = columns.new_zeros(len(columns), past.seen.shape[-2] - columns.shape[1], 2)
            columns = torch.cat([before, columns], dim=1)
        return decoder_mass(*self._run, columns, past).to(self._rows.device)[self._rows]

    def record(self, alpha_tv: torch.Tensor, alpha_vt: torch.Tensor, dropped: torch.Tensor) -> None:
        """Leave both attention ratios and the decision for the report, (N,) each."""
        table = torch.stack([self._rows.float(), alpha_tv.float(), alpha_vt.float(), dropped.float()]).cpu()
        self.records = [(int(row), float(tv), float(vt), bool(gone)) for row, tv, vt, gone in table.T]

    def leaving(self, keep: torch.Tensor) -> torch.Tensor:
        """Where the visual tokens are that a rule doesn't keep, (B, T), bool, on the CPU. `keep` is (N, S), bool."""
        slots = self._by_row(self.is_visual & ~keep.to(self.is_visual.device))
        return self._layout.unpack(slots).cpu() & self._prompt.visual & self._prompt.keep

    def _by_row(self, masks: torch.Tensor) -> torch.Tensor:
        """Put the samples of a row together, (N, ...) -> (B, ...), bool."""
        rows = masks.new_zeros(len(self._prompt.visual), *masks.shape[1:], dtype=torch.uint8)
        return rows.index_add(0, self._rows, masks.to(torch.uint8)).bool()


def prompt_text(prompt: Prompt) -> torch.Tensor:
    """Text of each sample behind its first visual token, up to its first answer or guess, (B, T), bool, on the CPU."""
    visual = prompt.visual
    samples = prompt.samples()
    samples = torch.zeros_like(visual, dtype=torch.int64) if samples is None else samples.cpu()
    labels = prompt.hints.labels
    labelled = torch.zeros_like(visual) if labels is None else labels.cpu() != -100
    text = torch.zeros_like(visual)
    for number in range(int(samples.max()) + 1):
        own = samples == number
        behind = own & ((visual & own).cumsum(1) > 0)
        text |= behind & ((labelled & behind).cumsum(1) == 0)
    if prompt.hints.guesses:
        text[:, -prompt.hints.guesses :] = False
    return text & prompt.attended & ~visual


# `generate` without a cache sends a prompt again with every word. What was decided on the prompt stays decided.


def remember(prompt: Prompt) -> None:
    """Note what was decided on the rows of a prompt that ran without a cache, with its encoded pictures."""
    for row, (memory, key) in enumerate(_keys(prompt, prompt.length)):
        if memory is not None:
            own = {
                index: (gone[row], [record[1:] for record in prompt.recorded[index] if record[0] == row])
                for index, gone in prompt.decisions.items()
            }
            memory[key] = own
            while len(memory) > REMEMBERED:
                memory.pop(next(iter(memory)), None)


def recall(prompt: Prompt) -> dict[int, tuple[torch.Tensor, list[Record]]]:
    """What was decided on the prompt that this one continues by a word, by layer; empty if it is another one."""
    if prompt.cache is not None or prompt.samples() is not None or prompt.hints.labels is not None:
        return {}
    known = [None if memory is None else memory.get(key) for memory, key in _keys(prompt, prompt.length - 1)]
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


def _keys(prompt: Prompt, length: int) -> list[tuple[dict | None, Any]]:
    """For each row, where what was decided on it is kept, and under which key: its pictures and first words."""
    keys: list[tuple[dict | None, Any]] = []
    for row, numbers in enumerate(prompt.rows_of_pictures()):
        pictures = [prompt.pictures[number] for number in numbers]
        encoding = pictures[0].encoding if pictures else None
        if encoding is None or prompt.ids is None or any(each.encoding is not encoding for each in pictures):
            keys.append((None, None))
        else:
            words = tuple(prompt.ids[row, :length].tolist())
            keys.append(
                (encoding.decisions, (prompt.rule, tuple((each.offset, each.length) for each in pictures), words))
            )
    return keys
