"""TextSelector, the base of the selectors that look at the question, and its words."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vltok.methods.pruning.selector import Selector
from vltok.visual import Need, VisualTokens


@dataclass(frozen=True)
class TextSelector(Selector):
    """A selector that looks at the question, `VisualTokens.text`.

    That is what the user says in the last turn, where the processor's chat template tells it apart, else all words of
    the prompt; never an answer, nor what is being generated.

    Attributes:
        text: The question in place of that; the processor must be given to `vltok.apply`.
    """

    text: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and not (isinstance(self.text, str) and self.text.strip()):
            raise ValueError(f"text must be a question, or None for the words of the prompt, got {self.text!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("text",)


def question_words(visual: VisualTokens, otherwise: str | None = None) -> list[torch.Tensor]:
    """Give the words of each image's question, without padding.

    Args:
        visual: What a selector is given.
        otherwise: What to do about an image without words, for the error. None if that is no error.

    Returns:
        Embeddings of B questions, (M_i, D) each, float32.

    Raises:
        ValueError: If there is no text, an image has no words and that is an error, or an embedding is NaN or infinite.
    """
    if visual.text is None or visual.text_mask is None:
        raise ValueError(
            "the question is compared with the image; give `text`, (B, M, D), and `text_mask`, (B, M)"
            + ("" if otherwise is None else f", or {otherwise}")
        )
    words = [text[mask].float() for text, mask in zip(visual.text.detach(), visual.text_mask, strict=True)]
    if otherwise is not None:
        _check_asked([len(each) > 0 for each in words], otherwise)
    broken = [image for image, each in enumerate(words) if not each.isfinite().all()]
    if broken:
        raise ValueError(f"the text of image {broken} of the batch holds NaN or infinite embeddings")
    return words


def clip_question(visual: VisualTokens, otherwise: str) -> torch.Tensor:
    """Give each image's question in CLIP's space, (B, E), float32.

    Args:
        visual: What a selector is given.
        otherwise: What to do about an image without words, for the error.

    Raises:
        ValueError: If nothing is given in CLIP's space, an image has no words, or a question is NaN or infinite.
    """
    if visual.clip_image is None or visual.clip_text is None:
        raise ValueError(
            "the question is compared with the image in CLIP's space; give `clip_image`, (B, N, E), and `clip_text`, "
            f"(B, E), or {otherwise}"
        )
    text = visual.clip_text.float()
    _check_asked(text.any(1).tolist(), otherwise)
    broken = (~text.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the text of image {broken} of the batch is NaN or infinite in CLIP's space")
    return text


def _check_asked(has_words: list[bool], otherwise: str) -> None:
    wordless = [image for image, has in enumerate(has_words) if not has]
    if wordless:
        raise ValueError(f"image {wordless} of the batch comes without a word of text; ask a question, or {otherwise}")
