"""From a conversation to the text a model is trained on, and where in that text its answers are.

Where a chat template marks what the model writes ({% generation %}), these places are taken. Else the template is asked
with marks in the place of the answers, which then replace the marks: so their places are exact whatever the template
writes around them, and whatever it makes of earlier turns.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from vltok.train.data import MEDIA, Sample, SampleError, Turn

Style = Literal["auto", "chat", "vicuna", "plain", "suffix"]
_MARK = "\ue000{}\ue001"  # of Unicode's private use area, which no template looks for
_MARKS = re.compile("\ue000(\\d+)\ue001")
_PRIVATE = re.compile("[\ue000\ue001]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACES = re.compile("|".join(f"({mark})" for mark in MEDIA.values()))
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class PromptText:
    """The text of a conversation, one placeholder of the processor per image and video.

    Attributes:
        text: The text.
        answers: Where each answer starts and where it ends, with its end-of-turn token, in characters.
        suffix: An answer that the processor takes apart from the text.
    """

    text: str
    answers: tuple[tuple[int, int], ...] = ()
    suffix: str | None = None

    @property
    def learned(self) -> list[str]:
        """The answers."""
        return [self.text[start:stop] for start, stop in self.answers]

    def cut(self, length: int) -> PromptText:
        """The first characters of it."""
        answers = tuple((start, min(stop, length)) for start, stop in self.answers if start < length)
        return PromptText(self.text[:length], answers, self.suffix if length >= len(self.text) else None)

    def marked(self) -> str:
        """The text with a mark before and behind each answer, which `unmark` takes out."""
        pieces, read = [], 0
        for start, stop in self.answers:
            pieces += [self.text[read:start], "\ue000", self.text[start:stop], "\ue001"]
            read = stop
        return "".join([*pieces, self.text[read:]])


def places_of_marks(text: str) -> list[int]:
    """Where a text has marks."""
    return [match.start() for match in _PRIVATE.finditer(text)]


def unmark(text: str) -> PromptText:
    """Take the marks out of a text that a processor may have written into since."""
    clean, answers = "", []
    for piece in text.split("\ue000"):
        answer, mark, rest = piece.partition("\ue001")
        answers += [(len(clean), len(clean) + len(answer))] if mark else []
        clean += answer + rest
    return PromptText(clean, tuple(answers))


class PromptWriter:
    """Writes conversations in a model's style.

    Args:
        processor: The model's processor. Its tokenizer must be a fast one.
        style: "chat" is the chat template of the processor, or else of its tokenizer. Answers that the template doesn't
            end with a special token are ended with the end-of-sequence token. "vicuna" is LLaVA-1.5's "USER: <image>",
            a new line, "... ASSISTANT: ...</s>". "plain" is LLaVA's first stage: the picture and its caption, without
            the question. "suffix" is PaliGemma's: images and one question, which are read in both directions, and its
            answer. "auto" is "suffix" if the processor takes one, else "chat" if there is a template, else "vicuna".

    Attributes:
        style: The style that was chosen.
        answers_by: What says where answers are: "template" if the chat template marks them by {% generation %}, "marks"
            if they are put into the text that the template or style writes.
        placeholders: What the processor replaces, by "image" and "video".
        wrapped: The same with what the chat template writes around it, such as marks of where an image begins and ends.

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
        self._asked = processor if processor.chat_template else self.tokenizer
        has_template = bool(self._asked.chat_template)
        if style == "chat" and not has_template:
            raise ValueError('style="chat" needs a chat template, and this processor has none; use "vicuna"')
        takes_suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
        if style == "auto":
            style = "suffix" if takes_suffix else "chat" if has_template else "vicuna"
        elif takes_suffix != (style == "suffix"):
            takes = "takes answers as a suffix alone" if takes_suffix else "takes no answers as a suffix"
            raise ValueError(f'{type(processor).__name__} {takes}, got style={style!r}; use style="auto"')
        self.style = style
        if self.style == "vicuna" and self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-sequence token to end answers with")
        template = self._asked.chat_template if self.style == "chat" else ""
        self._template = template.get("default", "") if isinstance(template, dict) else template
        self.answers_by = "template" if _GENERATION.search(self._template) else "marks"
        self.placeholders = self._find_placeholders()
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        ends = [t for t in special if t not in (*self.placeholders.values(), self.tokenizer.bos_token)]
        self._end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(ends, key=len, reverse=True)))})")
        self.wrapped = {kind: self._wrapped(kind, token) for kind, token in self.placeholders.items()}

    def _find_placeholders(self) -> dict[str, str]:
        """What stands for an image and a video: the processor's token, or what the template writes instead of it."""
        found = {kind: getattr(self.processor, f"{kind}_token", None) for kind in MEDIA}
        for kind, token in found.items():
            if token and MEDIA[kind] in self._template and token not in self._template:
                found[kind] = MEDIA[kind]
        return {kind: token for kind, token in found.items() if token}

    def _wrapped(self, kind: str, placeholder: str) -> str:
        """The placeholder with all that stands between two words around it."""
        if self.style != "chat":
            return placeholder
        before, behind = (_MARK.format(number) for number in range(2))
        turn = Turn("user", before + MEDIA[kind] + behind)
        try:
            text = self._asked.apply_chat_template(self._messages([turn]), tokenize=False)
        except (TemplateError, TypeError):
            return placeholder
        between = text.partition(before)[2].partition(behind)[0].strip()
        return between if between.count(placeholder) == 1 else placeholder

    def __call__(self, sample: Sample) -> PromptText:
        """Write a conversation.

        Raises:
            SampleError: If the style or the template can't express it.
        """
        if any(_PRIVATE.search(turn.text) for turn in sample.turns):
            raise SampleError(
                f"{sample.name} contains U+E000 or U+E001, characters for private use that mark answers here"
            )
        for kind, given in sample.media.items():
            if given and kind not in self.placeholders:
                raise SampleError(f"{sample.name} has {kind}s, and {type(self.processor).__name__} takes none")
        prompt = self._suffix(sample) if self.style == "suffix" else self._close(*self._write(sample), sample.name)
        for kind, placeholder in self.placeholders.items():
            count, given = prompt.text.count(placeholder), len(sample.media[kind])
            if count != given:
                raise SampleError(
                    f"{sample.name} has {given} {kind}s, but its text comes out with {count} {placeholder!r}: the chat "
                    f"template drops or adds {kind}s, or a turn contains that token"
                )
        return prompt

    def _write(self, sample: Sample) -> tuple[str, Spans]:
        """The text, and where its answers are."""
        if self.answers_by == "template":
            return self._generated(sample)
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        text = {"chat": self._chat, "vicuna": self._vicuna, "plain": self._plain}[self.style](_marked(sample), sample)
        before, *pieces = _MARKS.split(text)  # text, number, text, number, ..., text
        if pieces[::2] != [str(index) for index in range(len(answers))]:
            raise SampleError(
                f"{sample.name}: the chat template leaves out or repeats answers, so that nothing says which tokens "
                "are to be learned; use a template that marks them by {% generation %}, or another style"
            )
        places = []
        for answer, rest in zip(answers, pieces[1::2], strict=True):
            places.append((len(before), len(before) + len(answer)))
            before += answer + rest
        return before, places

    def _close(self, text: str, places: Spans, name: str) -> PromptText:
        """Stretch each answer over the end-of-turn token that the text has behind the last; or end it."""
        last = text[places[-1][0] : places[-1][1]].rstrip()
        ends = [match.group() for match in self._end.finditer(last) if match.end() == len(last)]
        if self.answers_by == "template" and ends:
            end = ends[-1]
            inside = [(start, start + len(text[start:stop].rstrip())) for start, stop in places]
            places = [new if text[: new[1]].endswith(end) else old for new, old in zip(inside, places, strict=True)]
        else:
            match = self._end.match(text, places[-1][1]) if self.style == "chat" else None
            end = "\n" if self.style == "plain" else match.group() if match else None
        if end is None and self.tokenizer.eos_token is None:
            raise SampleError(f"{name}: the chat template doesn't end answers, and there is no end-of-sequence token")
        closed, answers, read = "", [], 0
        for start, stop in places:
            closed += text[read:start]
            answer, read = text[start:stop], stop
            if end is not None and text.startswith(end, stop):
                answer, read = answer + end, stop + len(end)
            elif end is None or not answer.endswith(end):
                answer += self.tokenizer.eos_token
            answers.append((len(closed), len(closed) + len(answer)))
            closed += answer
        return PromptText(closed + text[read:], tuple(answers))

    def _generated(self, sample: Sample) -> tuple[str, Spans]:
        try:
            (text,), (places,) = render_jinja_template(
                conversations=[self._messages(sample.turns)],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise SampleError(f"{sample.name}: the chat template refuses it: {error}") from error
        if not places:
            raise SampleError(f"{sample.name}: the chat template marks none of its answers as generated")
        return text, places

    def _chat(self, turns: list[Turn], sample: Sample) -> str:
        try:
            return self._asked.apply_chat_template(self._messages(turns), tokenize=False)
        except (TemplateError, TypeError) as error:
            raise SampleError(f"{sample.name}: the chat template refuses it: {error}") from error

    def _messages(self, turns: Any) -> list[dict[str, Any]]:
        convert = _parts if self._asked is self.processor else self._inline
        return [{"role": turn.role, "content": convert(turn.text)} for turn in turns]

    def _vicuna(self, turns: list[Turn], sample: Sample) -> str:
        names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
        return "".join(
            f"{names[turn.role]}{self._inline(turn.text)}{'' if turn.role == 'assistant' else ' '}" for turn in turns
        )

    def _plain(self, turns: list[Turn], sample: Sample) -> str:
        turns = [turn for turn in turns if turn.role != "system"]
        if len(turns) != 2:
            raise SampleError(f'{sample.name}: style "plain" takes one question and its answer, got {len(turns)} turns')
        media = [self.placeholders[kind] * len(given) for kind, given in sample.media.items() if given]
        return "".join(media) + turns[1].text + "\n"

    def _suffix(self, sample: Sample) -> PromptText:
        turns = [turn for turn in sample.turns if turn.role != "system"]
        if len(turns) != 2:
            raise SampleError(
                f'{sample.name}: style "suffix" takes one question and its answer, got {len(turns)} turns'
            )
        question = _PLACES.sub("", turns[0].text).strip()
        return PromptText(self.placeholders["image"] * len(sample.images) + question, suffix=turns[1].text)

    def _inline(self, text: str) -> str:
        """Write media into the text; a single one comes first, on a line of its own, as LLaVA-1.5 has it."""
        found = [match.group() for match in _PLACES.finditer(text)]
        if len(found) == 1:
            text = f"{found[0]}\n{_PLACES.sub('', text).strip()}"
        kinds = {mark: kind for kind, mark in MEDIA.items()}
        return _PLACES.sub(lambda match: self.placeholders[kinds[match.group()]], text)


def _marked(sample: Sample) -> list[Turn]:
    turns, count = [], 0
    for turn in sample.turns:
        is_answer = turn.role == "assistant"
        turns.append(Turn(turn.role, _MARK.format(count)) if is_answer else turn)
        count += is_answer
    return turns


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn into the parts of a multimodal chat message; the template writes what stands around media."""
    if not _PLACES.search(text):
        return [{"type": "text", "text": text}]
    kinds = {mark: {"type": kind} for kind, mark in MEDIA.items()}
    pieces = [piece for piece in _PLACES.split(text) if piece]
    parts = [kinds.get(piece) or {"type": "text", "text": piece.strip("\n")} for piece in pieces]
    return [part for part in parts if part.get("text") != ""]
