"""Takes out of visual tokens what makes their cosines large and alike: what all have in common, or a few huge channels.

What is left of a token that has nothing else points anywhere. So similarity of corrected tokens goes with a weight: how
distinct a token is from the mean. Centring alone would keep the least distinct ones.

"centred" takes the mean out of the tokens as they enter the language model. "standardised" compares what the vision
tower says of them before the projector, each channel at mean 0 and variance 1. It is meant for mergers that mix several
patches, as Qwen's, behind towers of which a few channels are so large that they alone decide on plain cosines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch.nn.functional import normalize

from vltok.methods.pruning.greedy import check_usable
from vltok.methods.pruning.regions import part_of
from vltok.methods.pruning.tower import pick_patches
from vltok.visual import Need, VisualTokens

Correction = Literal["centred", "standardised"]
# Picks from some visual tokens by what stands for each in comparisons, (B, N, C), and by what its distances count,
# (B, N), or None for 1.
Pick = Callable[[VisualTokens, torch.Tensor, torch.Tensor | None], torch.Tensor]


def needed_by(correction: Correction | None) -> tuple[Need, ...]:
    """What a correction looks at besides embeddings."""
    return ("features",) if correction == "standardised" else ()


def pick_corrected(visual: VisualTokens, num_keep: int, correction: Correction | None, pick: Pick) -> torch.Tensor:
    """Let `pick` choose tokens by what a correction makes of them.

    With "standardised", tokens that stand for no patch, such as newline tokens, are left out of everything, the mean
    and the choice of a first pick included. They are kept only where all patches are, the lowest index first.

    Args:
        visual: Visual tokens of B images.
        num_keep: How many are kept, in 1..N.
        correction: Which one, or None.
        pick: Picks `num_keep` of the tokens it is given, (B, num_keep), ascending.

    Returns:
        Kept positions, (B, num_keep), ascending, int64.

    Raises:
        ValueError: If "standardised" is given no features, or some are NaN or infinite or overflow when squared.
    """
    if correction is None:
        return pick(visual, visual.embeddings, None)
    if correction == "centred":
        return pick(visual, *centred(visual.embeddings))
    if visual.features is None:
        raise ValueError('correction="standardised" needs the vision tower\'s features; give `features`, (B, N, C)')
    for values in (visual.embeddings, visual.features):
        check_usable(values)
    has_patch = (visual.features != 0).any(-1)
    if has_patch.all():
        return pick(visual, *standardised(visual.features))

    def pick_of(image: int, patches: torch.Tensor) -> torch.Tensor:
        own = {name: each[image : image + 1] for name, each in vars(visual).items() if isinstance(each, torch.Tensor)}
        part = part_of(replace(visual, **own), patches)
        return pick(part, *standardised(part.features))[0]

    ranks = visual.features.new_zeros(has_patch.shape, dtype=torch.float32).masked_fill(~has_patch, -math.inf)
    return pick_patches(ranks, num_keep, pick_of)


def centred(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the mean out of the tokens of each image.

    Args:
        tokens: Visual tokens, (B, N, D), any float dtype.

    Returns:
        The tokens without the mean over their image, (B, N, D), float32; and how distinct each is, (B, N), float32:
        1 - cosine with the mean, 0 to 2.
    """
    images = [own.float() for own in tokens]  # image by image, so that a row doesn't depend on the batch
    means = [own.mean(0) for own in images]
    pairs = list(zip(images, means, strict=True))
    rest = [own - mean for own, mean in pairs]
    distinct = [1 - torch.cosine_similarity(own, mean.unsqueeze(0), dim=-1) for own, mean in pairs]
    return (torch.stack(rest), torch.stack(distinct)) if rest else (tokens.float(), tokens.float().sum(-1))


@torch.no_grad()
def standardised(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring each channel of the tokens of each image to mean 0 and variance 1.

    Args:
        features: Visual tokens before the projector, (B, N, C), any float dtype, each of a patch.

    Returns:
        The standardised tokens, (B, N, C), float32, 0 in channels that are constant over an image; and how distinct
        each token is, (B, N), float32, 0 to 2: 1 - cosine with the mean, where channels are divided by their standard
        deviation and not centred.
    """
    rest, distinct = [], []
    for own in features:  # image by image, so that a row doesn't depend on the batch
        own = own.float()
        spread = own.std(0, correction=0)
        # A mean of equal numbers may be off by a rounding, which the division would blow up.
        constant = (own == own[:1]).all(0) | (spread == 0)
        scaled = torch.where(constant, 0.0, own / torch.where(constant, 1.0, spread))
        mean = scaled.mean(0)
        rest.append(scaled - mean)
        # Where a mean is large beside the deviation all cosines are near 1. Half the squared distance of unit vectors
        # is 1 - cosine, too, and loses nothing there.
        unit, towards = normalize(scaled, dim=-1), normalize(mean, dim=-1)
        distinct.append((unit - towards).square().sum(-1) / 2)
    return (torch.stack(rest), torch.stack(distinct)) if rest else (features.float(), features.float().sum(-1))
