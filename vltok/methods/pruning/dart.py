"""DART: keep visual tokens that duplicate a few pivots least.

Paper: https://arxiv.org/abs/2502.11494. Training-free. Differs from the released code: it works before the language
model, on embeddings; the budget is met exactly, where 128 became 132; and pivots come in ascending order, where the
released code takes them in the order of a Python set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.checks import check_integer
from vltok.method import register
from vltok.methods.pruning.greedy import check_usable, float32_products, times_row
from vltok.methods.pruning.question import TextSelector, question_words
from vltok.visual import Need, VisualTokens


def choose_pivots(
    keys: torch.Tensor,
    is_visual: torch.Tensor,
    is_text: torch.Tensor,
    num_visual: int = 4,
    num_text: int = 4,
    norm: int = 1,
) -> torch.Tensor:
    """Choose the tokens of the largest norms as pivots.

    Args:
        keys: Of all S tokens of a sample, (S, E): all heads side by side, or what stands in for them.
        is_visual: Which are visual tokens, (S,), bool.
        is_text: Which are text that may give pivots, (S,), bool.
        num_visual: Pivots among visual tokens; as many as there are, if fewer.
        num_text: Pivots among the text; as many as there are, if fewer.
        norm: Order of the norm; the released code takes 1.

    Returns:
        The pivots, (P,), ascending, int64; equal norms go to the lowest index.

    Raises:
        ValueError: If a key of visual tokens or text is NaN or infinite.
    """
    norms = torch.linalg.vector_norm(keys, norm, dim=1, dtype=torch.float32)
    if not norms[is_visual | is_text].isfinite().all():
        raise ValueError("the keys of visual tokens or text hold NaN or infinite values; check the image's pixels")
    pivots = []
    for among, count in ((is_visual, num_visual), (is_text, num_text)):
        where = among.nonzero().squeeze(1)
        pivots.append(where[norms[where].argsort(descending=True, stable=True)[:count]])
    return torch.cat(pivots).sort().values


def dart_order(state: torch.Tensor, pivots: torch.Tensor, is_visual: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Keep the visual pivots, and for each pivot in turn the visual tokens left that are least similar to it.

    Every pivot gets an equal share of what the visual pivots leave of the budget, the first ones a token more where it
    doesn't divide.

    Args:
        state: All S tokens of a sample, (S, D), any float dtype; similarity is the cosine in float32. Only those of
            visual tokens and pivots are looked at.
        pivots: The pivots in the order of their turns, (P,), at least one.
        is_visual: Which are visual tokens, (S,), bool.
        num_keep: How many visual tokens to keep, from the number of visual pivots up to that of visual tokens.

    Returns:
        Kept positions in the order they were picked, (num_keep,), int64; ties go to the lowest index.

    Raises:
        ValueError: If there is no pivot, `num_keep` is out of range, or a state is NaN or infinite or overflows when
            squared.
    """
    kept = pivots[is_visual[pivots]]
    places = is_visual.nonzero().squeeze(1)
    if not len(pivots) or not max(1, len(kept)) <= num_keep <= len(places):
        raise ValueError(
            f"num_keep must be in {max(1, len(kept))}..{len(places)} (from the visual pivots to the visual tokens), "
            f"with at least one pivot, got {num_keep} with {len(pivots)}"
        )
    x, at_pivots = state.detach()[places].float(), state.detach()[pivots].float()
    norms = torch.linalg.vector_norm(x, dim=1)
    if not (norms.isfinite().all() & torch.linalg.vector_norm(at_pivots, dim=1).isfinite().all()):
        raise ValueError(
            "the states of visual tokens or pivots hold NaN, infinite or overflowing values; check the image's pixels "
            "and the model's dtype"
        )
    taken = torch.isin(places, kept)
    order = [kept]
    product = x.new_empty(len(x), 1)
    share, more = divmod(num_keep - len(kept), len(pivots))
    with float32_products(x), torch.autocast(x.device.type, enabled=False):
        for turn, pivot in enumerate(at_pivots):  # whose length doesn't change the order
            times_row(x, pivot.unsqueeze(1), product)
            cosine = (product[:, 0] / norms.clamp_min(1e-12)).masked_fill_(taken, torch.inf)
            picks = cosine.argsort(stable=True)[: share + (turn < more)]
            taken[picks] = True
            order.append(places[picks])
    return torch.cat(order)


@register("dart")
@dataclass(frozen=True)
class DART(TextSelector):
    """Keep visual tokens that duplicate a few pivots least, of the image and of the question, where there is one.

    Attributes:
        visual_pivots: Visual tokens with the largest L1 norms, that stay, at least 1.
        text_pivots: Words of the question with the largest L1 norms; 0 leaves the question out.
    """

    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("visual_pivots", self.visual_pivots, least=1)
        check_integer("text_pivots", self.text_pivots, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("text",) if self.text_pivots else ()

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        check_usable(visual.embeddings)
        embeddings = visual.embeddings.detach().float()
        words = question_words(visual) if self.text_pivots else [x[:0] for x in embeddings]
        kept = torch.empty(len(words), num_keep, dtype=torch.int64, device=embeddings.device)
        for row, x, text in zip(kept, embeddings, words, strict=True):
            state = torch.cat([x, text])
            is_visual = torch.arange(len(state), device=x.device) < len(x)
            pivots = choose_pivots(state, is_visual, ~is_visual, min(self.visual_pivots, num_keep), self.text_pivots)
            row.copy_(dart_order(state, pivots, is_visual, num_keep))
        return kept.sort(dim=1).values
