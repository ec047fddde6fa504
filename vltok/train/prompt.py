"""From a conversation to the text a model is trained on, and where in that text its answers are.

A chat template is asked with marks in the place of the answers; the answers then replace the marks. So their places are
exact whatever the template writes around them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from vltok.train.data import IMAGE, Sample, SampleError, Turn

Style = Literal["auto", "chat", "vicuna", "plain"]
_MARK = "\ue000{}\ue001"  # of Unicode's private use area, which no template looks for
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class PromptText:
    """The text of a conversation, one placeholder of the processor per picture.

    Attributes:
        text: The text.
        answers: Where each answer starts and where it ends, with its end-of-turn token, in characters.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class PromptWriter:
    """Writes conversations in a model's style.

    Args:
        processor: The model's processor. Its tokenizer must be a fast one.
        style: "chat" is the chat template of the processor, or else of its tokenizer. Answers that the template doesn't
            end with a special token are ended with the end-of-sequence token. "vicuna" is LLaVA-1.5's "USER: <image>",
            a new line, "... ASSISTANT: ...</s>". "plain" is LLaVA's first stage: the picture and its caption, without
            the question. "auto" is "chat" if there is a template, else "vicuna".

    Raises:
        ValueError: If the style is unknown, or there is no template or token it needs.
    """

    def __init__(self, processor: Any, style: Style = "auto") -> None:
        if style not in get_args(Style):
            raise ValueError(f"style must be one of {', '.join(get_args(Style))}, got {style!r}")
        self.processor, self.tokenizer = processor, processor.tokenizer
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} can't say where tokens stand in the text; load the processor with a "
                "fast tokenizer (use_fast=True)"
            )
        has_template = bool(processor.chat_template or self.tokenizer.chat_template)
        if style == "chat" and not has_template:
            raise ValueError('style="chat" needs a chat template, and this processor has none; use "vicuna"')
        self.style = ("chat" if has_template else "vicuna") if style == "auto" else style
        if self.style == "vicuna" and self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-sequence token to end answers with")
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        ends = [token for token in special if token not in (processor.image_token, self.tokenizer.bos_token)]
        self._end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(ends, key=len, reverse=True)))})")

    def __call__(self, sample: Sample) -> PromptText:
        """Write a conversation.

        Raises:
            SampleError: If the style or the template can't express it.
        """
        if any(_MARK[0] in turn.text for turn in sample.turns):
            raise SampleError(f"{sample.name} contains U+E000, a character for private use that marks answers here")
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        text = {"chat": self._chat, "vicuna": self._vicuna, "plain": self._plain}[self.style](sample)
        prompt = self._fill(text, answers, sample.name)
        if (count := prompt.text.count(self.processor.image_token)) != len(sample.images):
            raise SampleError(
                f"{sample.name} has {len(sample.images)} pictures, but its text comes out with {count} "
                f"{self.processor.image_token!r}: the chat template drops pictures, or a turn contains that token"
            )
        return prompt

    def _fill(self, text: str, answers: list[str], name: str) -> PromptText:
        """Replace marks by answers, each up to the end-of-turn token that the text has behind the last mark."""
        pieces = _MARKS.split(text)  # text, number, text, number, ..., text
        if pieces[1::2] != [str(index) for index in range(len(answers))]:
            raise SampleError(f"{name}: the chat template leaves out or repeats answers")
        before, *behind = pieces[::2]
        match = self._end.match(behind[-1]) if self.style == "chat" else None
        end = "\n" if self.style == "plain" else match.group() if match else None
        if end is None and self.tokenizer.eos_token is None:
            raise SampleError(f"{name}: the chat template doesn't end answers, and there is no end-of-sequence token")
        places = []
        for answer, rest in zip(answers, behind, strict=True):
            closing = end if end is not None and rest.startswith(end) else ""
            added = "" if closing else self.tokenizer.eos_token
            places.append((len(before), len(before) + len(answer) + len(closing or added)))
            before += answer + added + rest
        return PromptText(before, tuple(places))

    def _chat(self, sample: Sample) -> str:
        asked = self.processor if self.processor.chat_template else self.tokenizer
        convert = _parts if asked is self.processor else self._inline
        turns = _marked(sample)
        messages = [{"role": turn.role, "content": convert(turn.text)} for turn in turns]
        try:
            return asked.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise SampleError(f"{sample.name}: the chat template refuses it: {error}") from error

    def _vicuna(self, sample: Sample) -> str:
        names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
        return "".join(
            f"{names[turn.role]}{self._inline(turn.text)}{'' if turn.role == 'assistant' else ' '}"
            for turn in _marked(sample)
        )

    def _plain(self, sample: Sample) -> str:
        turns = [turn for turn in _marked(sample) if turn.role != "system"]
        if len(turns) != 2:
            raise SampleError(f'{sample.name}: style "plain" takes one question and its answer, got {len(turns)} turns')
        return self.processor.image_token * len(sample.images) + turns[1].text + "\n"

    def _inline(self, text: str) -> str:
        """Write pictures into the text; a single one comes first, on a line of its own, as LLaVA-1.5 has it."""
        if text.count(IMAGE) == 1:
            text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"
        return text.replace(IMAGE, self.processor.image_token)


def _marked(sample: Sample) -> list[Turn]:
    turns, count = [], 0
    for turn in sample.turns:
        is_answer = turn.role == "assistant"
        turns.append(Turn(turn.role, _MARK.format(count)) if is_answer else turn)
        count += is_answer
    return turns


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn into the parts of a multimodal chat message; the template writes what stands around pictures."""
    pieces = text.split(IMAGE)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index > 0 else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
    return parts
