"""What selectors share that look at the vision tower: whose attention they ask for, picking, and merging.

Some visual tokens stand for no patch, such as the newlines of AnyRes layouts: their attention is -inf. They are kept
only where all patches are, are merged into nothing, and nothing is merged into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vltok.methods.pruning.greedy import float32_products
from vltok.methods.pruning.ranking import select_top
from vltok.methods.pruning.selector import Selector
from vltok.visual import AttentionRequest, Need, Selection, VisualTokens


@dataclass(frozen=True)
class TowerSelector(Selector):
    """A selector by the attention of the tower's last layer but one: of [CLS] where there is one, else received."""

    def attention_request(self, has_cls: bool) -> AttentionRequest:
        return AttentionRequest("cls" if has_cls else "received", layer=-2)

    def given(self, visual: VisualTokens, *names: str) -> list[torch.Tensor]:
        """What the tower says of these tokens, by the names of `VisualTokens`; ValueError if something is missing."""
        for name in names:
            if getattr(visual, name) is None:
                raise ValueError(f"{type(self).__name__} needs the vision tower's {name}; give `{name}`, (B, N, ...)")
        return [getattr(visual, name) for name in names]


@dataclass(frozen=True)
class TowerMerger(TowerSelector):
    """A selector by that attention which merges tokens by their keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge is not None:
            raise ValueError(f"{type(self).__name__} merges tokens by itself; leave out merge={self.merge!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("features", "keys")

    @property
    def merges(self) -> bool:
        return True


@torch.no_grad()
def pick_patches(
    attention: torch.Tensor, num_keep: int, pick: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Pick image by image among the tokens that stand for a patch.

    Args:
        attention: (B, N), -inf where a token stands for no patch. An image with no more patches than are kept keeps
            them all, and then other tokens, the lowest index first.
        num_keep: How many to keep, in 1..N.
        pick: Is asked about all other images. Gets the image's number in the batch and its P patches, (P,), ascending;
            returns which of these are kept, (num_keep,), as numbers in 0..P - 1, each once, in any order.

    Returns:
        Kept positions, (B, num_keep), ascending, int64.

    Raises:
        ValueError: If `num_keep` is out of range, or attention is NaN or +inf.
    """
    kept = select_top(attention, num_keep)
    if (attention == math.inf).any():
        raise ValueError("the attention that ranks visual tokens is infinite; check the image's pixels")
    for image, row in enumerate(attention):
        patches = (row > -math.inf).nonzero().squeeze(1)
        if len(patches) > num_keep:
            kept[image] = patches[pick(image, patches)].sort().values
    return kept


def mix_tokens(visual: VisualTokens, indices: torch.Tensor, weights: torch.Tensor) -> Selection:
    """Put sums of tokens where single ones stood: before the projector where that is possible, else behind it.

    Sums are made in float32, and gradients flow through them.

    Args:
        visual: The visual tokens.
        indices: Kept positions, (B, K), ascending.
        weights: How much of each token each kept one has, (B, K, N), float32.

    Raises:
        ValueError: If features are missing, or a token is NaN or infinite, which would reach all sums.
    """
    values = visual.features if visual.can_project else visual.embeddings
    if values is None:
        raise ValueError(
            "tokens are merged before the projector where `can_project` says so; give `features`, (B, N, C)"
        )
    if not values.isfinite().all():
        raise ValueError("the visual tokens to merge hold NaN or infinite values; check the image's pixels")
    with float32_products(values), torch.autocast(values.device.type, enabled=False):
        # image by image, so that a sum doesn't depend on the batch
        rows = [(weight @ own.float()).to(own.dtype) for weight, own in zip(weights, values, strict=True)]
    mixed = torch.stack(rows) if rows else values.new_empty(*indices.shape, values.shape[2])
    return Selection(indices, features=mixed) if visual.can_project else Selection(indices, embeddings=mixed)
