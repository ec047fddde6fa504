"""Takes out of visual tokens what all of an image have in common, which makes their cosines large and alike.

What is left of a token that has nothing else points anywhere. So similarity of centred tokens goes with a weight: how
distinct a token is from the mean. Centring alone would keep the least distinct ones.
"""

from __future__ import annotations

from typing import Literal

import torch

Correction = Literal["centred"]


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
