"""SparseVLM: keep the visual tokens that the words which concern the image attend to most, in three decoder layers.

Paper: https://arxiv.org/abs/2410.04417. Training-free. This is its rule of ranking. Differs from the released code:
what leaves isn't merged, tokens keep their positions, all heads count, attention isn't divided by a bias of rotary
positions, images have their own budgets, no token has to leave, and each sample of a batch has its own picks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.pruning.ranking import keep_top
from vltok.methods.pruning.rule import RuleInStages
from vltok.visual import DecoderState


def rater_scores(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Say how much each word concerns an image: the mean over its tokens of the softmax over the words of products.

    Args:
        image: Embeddings of visual tokens, (V, D).
        text: Embeddings of words, (M, D).

    Returns:
        (M,), float32, of sum 1.
    """
    with torch.autocast(image.device.type, enabled=False):
        return (image.float() @ text.float().T).softmax(-1).mean(0)


def choose_raters(embeddings: torch.Tensor, is_visual: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Choose the words that rank visual tokens: those that concern the images more than the mean of all words.

    Args:
        embeddings: What entered the decoder, (N, P, D).
        is_visual: Visual tokens, (N, P), bool.
        is_text: Words behind them, (N, P), bool.

    Returns:
        (N, P), bool; where all words are alike, all of them. None of a row without words, or without visual tokens.
    """
    raters = torch.zeros_like(is_text)
    for x, visual, text, chosen in zip(embeddings, is_visual, is_text, raters, strict=True):
        if visual.any() and text.any():
            scores = rater_scores(x[visual], x[text])
            above = scores > scores.mean()
            chosen[text] = above if above.any() else scores == scores.max()
    return raters


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(RuleInStages):
    """Keep the visual tokens with the most attention of chosen words of the question, mean over heads and words.

    The words are chosen once, by what entered the decoder; where there is none, the prompt's last token takes their
    place. The ratios are 300, 200 and 118 of 576 tokens, published for 192 on average, after layers 2, 6 and 15 of 32,
    counted from 0. For 128: 238, 108, 60; for 96: 246, 54, 28; for 64: 66, 34, 20.
    """

    ratios: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    depths: tuple[float, ...] = (3 / 32, 7 / 32, 16 / 32)

    def keep(self, state: DecoderState) -> torch.Tensor:
        entry = state.entry
        raters = choose_raters(entry.embeddings, entry.is_visual, entry.is_text).gather(1, entry.slots) & state.is_text
        nobody = ~raters.any(1)
        raters[nobody, state.last[nobody]] = True
        counts = raters.sum(1).tolist()
        queries = raters.int().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
        rows = zip(state.attention(queries), counts, strict=True)
        return keep_top(torch.stack([own[:count].mean(0) for own, count in rows]), state.images, self.budgets(state))
