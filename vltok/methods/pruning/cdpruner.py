"""CDPruner: keep visual tokens that are relevant to the question and differ from each other.

Paper: https://arxiv.org/abs/2506.10967. Training-free. Differs from the released code: by default relevance is the
cosine of a token with the mean of the question's words in the language model's space, as in OpenVINO, and weighs
exponentially. As the released code does, relevance="clip" asks CLIP's text tower, and theta=None weighs by relevance as
it is; but every segment of a long question is a whole text with marks of its begin and end, where the released code
cuts one text in pieces. Relevance is scaled image by image and not over the batch; and where the picked tokens span all
others, the most relevant tokens follow, where the released code repeats an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vltok.checks import check_choice, is_number
from vltok.method import register
from vltok.methods.pruning.determinant import max_determinant_order
from vltok.methods.pruning.greedy import float32_products, times_row
from vltok.methods.pruning.question import TextSelector, clip_question, question_words
from vltok.visual import Need, VisualTokens

_OTHERWISE = "set relevance=None, which picks by diversity alone"


def word_relevance(tokens: torch.Tensor, words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Say how relevant tokens are to a question: the cosine with the mean of its words.

    Args:
        tokens: Visual tokens in the language model's space, (B, N, D).
        words: Embeddings of each image's words, (M_i, D), float32, at least one.

    Returns:
        Relevance, (B, N), float32, in -1..1; 0 for a zero embedding.
    """
    relevance = torch.empty(tokens.shape[:2], device=tokens.device)
    with float32_products(tokens), torch.autocast(tokens.device.type, enabled=False):
        # Image by image, so that a row doesn't depend on the batch.
        for row, x, text in zip(relevance, tokens.detach(), words, strict=True):
            x, mean = x.float(), text.mean(0)
            times_row(x, mean.unsqueeze(1), row.unsqueeze(1))
            row /= (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(mean)).clamp_min(1e-12)
    return relevance


def clip_relevance(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Say how relevant tokens are to a question in CLIP's space: minus the mean cosine with its segments.

    Minus, as CLIP's patches are less like a text the more they show what it is about. That is so in CLIP alone.

    Args:
        image: Visual tokens in CLIP's space, (B, N, E).
        text: Each question: the mean of the unit embeddings of its segments, (B, E), float32, not 0.

    Returns:
        Relevance, (B, N), float32, in -1..1. A zero embedding, of a token that stands for no patch, is as relevant as
        the least relevant of its image.
    """
    # The mean of cosines is the product with the mean unit text, whose own length word_relevance divides by.
    relevance = -word_relevance(image, list(text.unsqueeze(1))) * torch.linalg.vector_norm(text, dim=1, keepdim=True)
    is_zero = (image == 0).all(2)
    least = relevance.masked_fill(is_zero, torch.inf).amin(1, keepdim=True)
    return torch.where(is_zero, least.masked_fill(is_zero.all(1, keepdim=True), 0), relevance)


def relevance_weights(relevance: torch.Tensor, theta: float | None = None, parity: bool = False) -> torch.Tensor:
    """Make weights of relevance: 1 for the most relevant token of an image, and about 0 for the least.

    Args:
        relevance: Any scale, (B, N).
        theta: How much relevance counts beside diversity, in [0, 1): weights become exp(theta / (2 - 2 theta) w), all
            the same at 0. None takes w as it is, as the released code does.
        parity: Scale over the whole batch, as the released code does; flat relevance is then divided by zero.

    Returns:
        Weights, (B, N), float32. Flat relevance weighs all the same.
    """
    relevance = relevance.float()
    low, high = (relevance.amin(), relevance.amax()) if parity else torch.aminmax(relevance, dim=1, keepdim=True)
    weights = (relevance - low + 1e-6) / (high - low + (0 if parity else 1e-6))
    return weights if theta is None else torch.exp(theta / (2 - 2 * theta) * weights)


def conditional_order(
    tokens: torch.Tensor,
    relevance: torch.Tensor | None,
    num_keep: int,
    theta: float | None = None,
    parity: bool = False,
) -> torch.Tensor:
    """Pick tokens that are relevant and differ from each other: a determinantal point process, by greedy MAP.

    Args:
        tokens: Visual tokens, (B, N, D), any float dtype; similarity is the cosine in float32.
        relevance: How relevant each is, (B, N), on any scale; the released code takes minus the mean cosine with the
            texts in CLIP's space. None picks by diversity alone.
        num_keep: How many to keep per image, in 1..N.
        theta: See `relevance_weights`.
        parity: See `relevance_weights`.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index. Where the
        picked tokens span all others, the most relevant follow.

    Raises:
        ValueError: If `num_keep` is out of range, or an embedding or relevance is NaN or infinite.
    """
    weights = None if relevance is None else relevance_weights(relevance, theta, parity)
    return max_determinant_order(tokens, num_keep, weights)


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(TextSelector):
    """Keep visual tokens that are relevant to the question and differ from each other.

    Attributes:
        relevance: "embeddings" compares tokens with the question's words in the language model's space; "clip" with
            the question in CLIP's space, for a CLIP vision tower and with `text_tower` of `vltok.apply`; None leaves
            the question out, so that diversity alone counts.
        theta: How much relevance counts, in [0, 1), see `relevance_weights`; None weighs by relevance as it is.
    """

    relevance: Literal["embeddings", "clip"] | None = "embeddings"
    theta: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ("embeddings", "clip", None))
        if self.theta is not None and (not is_number(self.theta) or not 0 <= self.theta < 1):
            raise ValueError(f"theta says how much relevance counts, in [0, 1), or is None, got {self.theta!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return {"embeddings": ("text",), "clip": ("clip",), None: ()}[self.relevance]

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        relevance = None
        if self.relevance == "embeddings":
            relevance = word_relevance(visual.embeddings, question_words(visual, _OTHERWISE))
        if self.relevance == "clip":
            relevance = clip_relevance(visual.clip_image, clip_question(visual, _OTHERWISE))
        return conditional_order(visual.embeddings, relevance, num_keep, self.theta).sort(dim=1).values
