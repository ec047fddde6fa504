"""MMTok: keep visual tokens that cover the question's words and the whole image.

Paper: https://arxiv.org/abs/2508.18264. Training-free. Differs from the released code: every word of the question
counts, where the released code leaves out stop words before LLaVA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vltok.checks import is_number
from vltok.method import register
from vltok.methods.pruning.covering import cover_greedily
from vltok.methods.pruning.greedy import check_usable, float32_products, write_gram
from vltok.methods.pruning.question import TextSelector, question_words
from vltok.visual import Need, VisualTokens


def coverage(
    tokens: torch.Tensor,
    features: torch.Tensor,
    words: torch.Tensor,
    alpha: float = 0.5,
    word_temperature: float = 0.02,
    image_temperature: float = 0.2,
) -> torch.Tensor:
    """Say how well each token of an image covers each word, and each token.

    Words spread their weight of 1 / M over the tokens by a softmax of cosines in the language model's space, tokens
    their weight of alpha / N by one of cosines of the vision tower's features.

    Args:
        tokens: Visual tokens, (N, D).
        features: The vision tower's, (N, C).
        words: Of the question, (M, D).
        alpha: What the image counts beside the question.
        word_temperature: Of the words' softmax.
        image_temperature: Of the tokens' softmax.

    Returns:
        (N, M + N), float32: row n is what token n covers. Equal tokens have equal rows.
    """
    length, count = len(tokens), len(words)
    out = torch.empty(length, count + length, device=tokens.device)
    with float32_products(out), torch.autocast(tokens.device.type, enabled=False):
        cosines = _products(_unit(tokens), _unit(words))  # (N, M)
        out[:, :count] = (cosines / word_temperature).softmax(0) / count
        gram = torch.empty(length, length, device=tokens.device)
        write_gram(_unit(features), gram)
    # The cosines are symmetric, so column u says where token u's weight goes.
    out[:, count:] = (gram / image_temperature).softmax(0) * (alpha / length)
    return out


def _unit(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-8)


def _products(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """X W^T, (N, M), with equal rows for equal rows of X."""
    if len(x) <= 16:
        return (x.double() @ words.double().T).float()
    # BLAS kernels for a few columns would add up the last rows in another order.
    padded = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % 32))
    return (x @ padded.T)[:, : len(words)]


def cover_order(covers: torch.Tensor, num_keep: int, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """Pick again and again what adds most to the sum of the best covers so far (greedy maximum coverage).

    Args:
        covers: How well each of N candidates covers each of R things, at least 0, (N, R), float32.
        num_keep: How many to pick, at least 1.
        excluded: Candidates not to be picked, (N,), bool.

    Returns:
        Picks in the order they were made, (num_keep,), int64, each once; ties go to the lowest index.

    Raises:
        ValueError: If there are not so many candidates.
    """
    allowed = len(covers) - (0 if excluded is None else int(excluded.sum()))
    if not 1 <= num_keep <= allowed:
        raise ValueError(f"num_keep must be in 1..{allowed} (the visual tokens), got {num_keep}")
    weights = covers.new_ones(len(covers))
    if excluded is not None:
        weights = weights.masked_fill(excluded, -math.inf)
    return cover_greedily(covers.unsqueeze(0), num_keep, weights.unsqueeze(0))[0]


@register("mmtok")
@dataclass(frozen=True)
class MMTok(TextSelector):
    """Keep visual tokens that cover the question's words and the whole image (greedy maximum coverage).

    Attributes:
        alpha: What covering the image counts beside covering the question, at least 0.
        word_temperature: How sharply words choose the tokens that cover them: of a softmax, above 0. 0.02 in the
            released code for LLaVA, 0.01 for Qwen.
        image_temperature: The same for tokens of the image.
    """

    alpha: float = 0.5
    word_temperature: float = 0.02
    image_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha) or not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha!r}")
        for name in ("word_temperature", "image_temperature"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("features", "text")

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        if visual.features is None:
            raise ValueError("MMTok compares what the vision tower says of the tokens; give `features`, (B, N, C)")
        words = question_words(visual, "use a method that needs no question, such as DivPrune")
        check_usable(visual.embeddings)
        check_usable(visual.features)
        images = zip(visual.embeddings.detach(), visual.features.detach(), words, strict=True)
        kept = torch.empty(len(words), num_keep, dtype=torch.int64, device=visual.embeddings.device)
        for row, (tokens, features, text) in zip(kept, images, strict=True):
            covers = coverage(tokens, features, text, self.alpha, self.word_temperature, self.image_temperature)
            row.copy_(cover_order(covers, num_keep))
        return kept.sort(dim=1).values
