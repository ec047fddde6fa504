"""Says which words of a prompt are its question: those of the last turn of the user, or all that is no answer.

prompt     <s> user : v v v w w assistant : w w user : w w w assistant :
question                                              x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vltok.engine.answers import each_sample, until_answered
from vltok.errors import UnsupportedInputError
from vltok.visual import Selection

if TYPE_CHECKING:
    from vltok.engine.features import Encoding
    from vltok.engine.picking import Part
    from vltok.engine.pictures import Picture
    from vltok.engine.prompt import Prompt

Turn = tuple[list[int], list[int]]  # the ids before what a user says, and behind it
_WORDS = ("QXZJ", "JZXQ", "ZQJX")  # what no template says


def turn_of(processor: Any) -> Turn | None:
    """The ids that stand around what a user says, by a processor's chat template; None if it has none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) is None and getattr(tokenizer, "chat_template", None) is None:
        return None
    text = _written(processor, lambda word: [{"type": "text", "text": word}])
    text = _written(processor, lambda word: word) if text is None else text
    if text is None:
        return None
    first, rest = text.split(_WORDS[0])
    behind, rest = rest.split(_WORDS[1])
    between, end = rest.split(_WORDS[2])
    before = _common(first[::-1], between[::-1])[::-1].strip()
    behind = _common(behind, end).strip()
    ids = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in (before, behind)]
    return (ids[0], ids[1]) if ids[0] else None


def _common(one: str, other: str) -> str:
    """How two texts begin alike."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _written(processor: Any, content: Any) -> str | None:
    """A talk as the template writes it, or None if it doesn't take such content."""
    roles = ("user", "assistant", "user")
    talk = [{"role": role, "content": content(word)} for role, word in zip(roles, _WORDS, strict=True)]
    try:
        text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise what it likes
        return None
    return text if all(text.count(word) == 1 for word in _WORDS) else None


def question(prompt: Prompt, turn: Turn | None) -> torch.Tensor:
    """The words of each sample's question, (B, T), bool, on the CPU.

    Answers that training looks at, and what a draft model guessed, are none; nor is what stands behind them.

    Args:
        prompt: The prompt.
        turn: What stands around what a user says; None for all words.
    """
    words = until_answered(prompt)
    if turn is None or prompt.ids is None:
        return words
    ids = prompt.ids.cpu()
    for sample in each_sample(prompt):
        for row, own in enumerate(sample & prompt.attended):
            end = words[row] & own
            begin = int(own.nonzero()[0]) if own.any() else 0
            stop = int(end.nonzero()[-1]) + 1 if end.any() else begin
            inside = _last_turn(ids[row, begin:stop].tolist(), turn)
            if inside is not None:
                words[row, begin : begin + inside[0]] = False
                words[row, begin + inside[1] : stop] = False
    return words


def _last_turn(ids: list[int], turn: Turn) -> tuple[int, int] | None:
    """Where the words of the last turn of the user begin and end, or None if there is none."""
    before, behind = turn
    starts = _places(ids, before)
    if not starts:
        return None
    begin = starts[-1] + len(before)
    ends = [place for place in _places(ids, behind) if place >= begin] if behind else []
    return begin, ends[0] if ends else len(ids)


def _places(ids: list[int], wanted: list[int]) -> list[int]:
    return [place for place in range(len(ids) - len(wanted) + 1) if ids[place : place + len(wanted)] == wanted]


class Words:
    """The words of the questions of a prompt, for selectors that look at them.

    Args:
        prompt: The prompt, whose pictures are known.
        embeds: What would enter the language model, (B, T, D).
    """

    def __init__(self, prompt: Prompt, embeds: torch.Tensor) -> None:
        self._prompt = prompt
        self._embeds = embeds
        self._text = getattr(prompt.selector, "text", None)  # a TextSelector has it, others may need the words, too
        self._given = self._embedded(self._text) if "text" in prompt.selector.needs else None
        self._places = None if self._text is not None else question(prompt, prompt.engine.turn)
        self._in_clip: dict[str, torch.Tensor] = {}

    def of(self, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """The words asked about some pictures: embeddings (G, M, D), and which are no padding, (G, M), bool."""
        if self._given is not None:
            text = self._given.expand(len(parts), -1, -1)
            return text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        texts = [self._asked(self._prompt.pictures[part.picture]) for part in parts]
        mask = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
        return pad_sequence(texts, batch_first=True), pad_sequence(mask, batch_first=True)

    def in_clip(self, parts: Sequence[Part]) -> torch.Tensor:
        """The questions about some pictures in CLIP's space, (G, E); each question is read once."""
        tower, texts = self._prompt.engine.text_tower, [self._as_text(part) for part in parts]
        for text in texts:
            if text not in self._in_clip:
                self._in_clip[text] = tower.of_text(text)
        return torch.stack([self._in_clip[text] for text in texts])

    def _as_text(self, part: Part) -> str:
        """The question about a picture as text."""
        if self._text is not None:
            return self._text
        ids = self._prompt.ids
        if ids is None:
            raise UnsupportedInputError(
                "CLIP reads the question as text, which can't be told from inputs_embeds; pass input_ids, or say the "
                'question: handle.using(text="...")'
            )
        row, own = self._own(self._prompt.pictures[part.picture])
        return self._prompt.engine.text_tower.words(ids[row, own.to(ids.device)].tolist())

    def _asked(self, picture: Picture) -> torch.Tensor:
        row, own = self._own(picture)
        return self._embeds[row, own.to(self._embeds.device)]

    def _own(self, picture: Picture) -> tuple[int, torch.Tensor]:
        """The row that a picture is in, and where in it the words asked about it are, (T,), bool, on the CPU."""
        row, samples = picture.row * self._prompt.repeat, self._prompt.samples()
        own = self._places[row]
        if samples is not None:
            at = self._prompt.visual[:: self._prompt.repeat].flatten().nonzero()[picture.start] % len(own)
            own = own & (samples[row] == samples[row, at]).cpu()
        return row, own

    def _embedded(self, text: str | None) -> torch.Tensor | None:
        """Words that the selector was given, (M, D), or None."""
        if text is None:
            return None
        processor = self._prompt.engine.processor
        if processor is None:
            raise UnsupportedInputError(
                "text= needs the processor, whose tokenizer knows the words: vltok.apply(model, method, "
                "processor=processor); or leave it out, and the words of the prompt are taken"
            )
        ids = getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]
        return self._prompt.model.get_input_embeddings()(torch.tensor(ids, device=self._embeds.device))

    # `generate` without a cache sends a prompt again with every word. What was picked for the question stays picked.

    def recalled(self, parts: Sequence[Part]) -> Selection | None:
        """What was picked of these for the prompt that this one continues by a word, or None."""
        if self._prompt.cache is not None or self._prompt.hints.labels is not None:
            return None
        known = []
        for part in parts:
            encoding, keys = self._keys(part, self._prompt.length - 1)
            known.append(encoding.decisions.get(keys[0]) if keys else None)
        if any(each is None for each in known):
            return None
        indices, embeddings = zip(*known, strict=True)
        found = Selection(torch.stack(indices), None if embeddings[0] is None else torch.stack(embeddings))
        self.remember(parts, found)
        return found

    def remember(self, parts: Sequence[Part], selection: Selection) -> None:
        """Note what was picked, with the encoded pictures."""
        if self._prompt.cache is not None:
            return
        for number, part in enumerate(parts):
            encoding, keys = self._keys(part, self._prompt.length)
            content = None if selection.embeddings is None else selection.embeddings[number].detach()
            for key in keys:
                encoding.decide(key, (selection.indices[number], content))

    def _keys(self, part: Part, length: int) -> tuple[Encoding | None, list[Any]]:
        """Where picks of a part are kept, and under which keys: what it is, and the first words of each repetition."""
        prompt, picture = self._prompt, self._prompt.pictures[part.picture]
        if picture.encoding is None or prompt.ids is None or prompt.samples() is not None:
            return None, []
        own = prompt.selector, picture.offset + part.begin, part.length
        rows = range(picture.row * prompt.repeat, (picture.row + 1) * prompt.repeat)
        return picture.encoding, [(*own, tuple(prompt.ids[row, :length].tolist())) for row in rows]
