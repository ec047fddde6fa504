"""DART in the decoder: keep a few visual tokens with large keys, and those least like them and the question's words.

Paper: https://arxiv.org/abs/2502.11494. Training-free. Differs from the released code: exactly as many tokens stay as
were asked for, where that keeps 4 + 8 * floor(k / 8); pivots take turns in ascending order, where that follows a Python
set; similarity is that of the states which the layer's attention looks at, where that normalises the layer's output by
the decoder's last norm; a question of fewer than four words has fewer pivots; and pivots have the largest L2 norm of
keys, where that takes the L1 norm, which rotary positions change, so that padding in front of a prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.pruning.dart import choose_pivots, dart_order
from vltok.methods.pruning.rule import RuleAtLayer
from vltok.visual import DecoderState

NUM_PIVOTS = 4  # among visual tokens, and as many among words
NORM = 2  # order of the norm of keys


@torch.no_grad()
def select_unlike(
    states: torch.Tensor, keys: torch.Tensor, visual: torch.Tensor, text: torch.Tensor, num_keep: int
) -> torch.Tensor:
    """Pick visual pivots, and for each pivot in turn the visual tokens left that are least like it.

    See `choose_pivots` and `dart_order`. What is left of the budget is shared equally among all pivots, the first ones
    taking one more where it doesn't divide. Similarity is the cosine in float32.

    Args:
        states: Hidden states of a sample, (S, D).
        keys: Keys of the same tokens, (S, C).
        visual: The visual tokens of one image, (V,), int64, ascending.
        text: Words of the question, (M,), int64, ascending; may be none.
        num_keep: How many to keep, at least 1; all of fewer tokens are kept.

    Returns:
        Which of the S tokens are kept, (min(num_keep, V),), ascending, int64. Ties went to the lowest index.

    Raises:
        ValueError: If `num_keep` is below 1, or a state or key is NaN or infinite.
    """
    if num_keep < 1:
        raise ValueError(f"num_keep must be at least 1, got {num_keep}")
    if len(visual) <= num_keep:
        return visual
    nothing = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    is_visual, is_text = nothing.index_fill(0, visual, True), nothing.index_fill(0, text, True)
    pivots = choose_pivots(keys, is_visual, is_text, min(NUM_PIVOTS, num_keep), NUM_PIVOTS, NORM)
    return dart_order(states, pivots, is_visual, num_keep).sort().values


@register("dart_decoder")
@dataclass(frozen=True)
class DARTDecoder(RuleAtLayer):
    """Keep visual tokens that don't repeat others: four pivots by key norm, and those least like these and four words.

    Each image is looked at by itself; the words are those of the question, behind the first image.
    """

    def keep(self, state: DecoderState) -> torch.Tensor:
        keep = ~state.is_visual
        rows = zip(state.hidden_states, state.keys, state.images, state.is_text, self.budgets(state), strict=True)
        for number, (states, keys, images, is_text, budgets) in enumerate(rows):
            text = is_text.nonzero().squeeze(1)
            for image, budget in enumerate(budgets):
                visual = (images == image).nonzero().squeeze(1)
                keep[number, select_unlike(states, keys, visual, text, budget)] = True
        return keep
