"""OTPrune: keep visual tokens whose distribution stays close to that of all tokens (optimal transport).

Paper: https://arxiv.org/abs/2602.20205. Training-free. As in the released code, channels and not tokens are brought to
unit length. Differs from it: kept tokens stay in the order of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.pruning.determinant import max_determinant_order
from vltok.methods.pruning.greedy import GRAM_ENTRIES, check_usable, float32_products, write_gram
from vltok.methods.pruning.selector import Selector
from vltok.visual import VisualTokens


def transport_order(tokens: torch.Tensor, num_keep: int, gamma: float = 0.01) -> torch.Tensor:
    """Pick greedily the tokens of the largest log det(I + gamma G G^T), G the products of tokens with each other.

    Channels are brought to unit length over the tokens before.

    Args:
        tokens: Visual tokens, (B, N, D), any float dtype; computed in float32.
        num_keep: How many to keep per image, in 1..N.
        gamma: Weight of the tokens beside the identity.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index.

    Raises:
        ValueError: If `num_keep` is out of range, or an embedding is NaN or infinite.
    """
    length = tokens.shape[1]
    check_usable(tokens)
    orders = []
    for part in tokens.detach().split(max(1, GRAM_ENTRIES // length**2)):
        gram = torch.empty(len(part), length, length, device=tokens.device)
        with float32_products(gram), torch.autocast(tokens.device.type, enabled=False):
            for x, out in zip(part, gram, strict=True):
                x = x.float()
                write_gram(x / torch.linalg.vector_norm(x, dim=0).clamp_min(1e-12), out)
        # gamma G G^T has the entries w_i w_j cos(G_i, G_j).
        weights = math.sqrt(gamma) * torch.linalg.vector_norm(gram, dim=2)
        orders.append(max_determinant_order(gram, num_keep, weights, ridge=1.0))
    return torch.cat(orders)


@register("otprune")
@dataclass(frozen=True)
class OTPrune(Selector):
    """Keep visual tokens whose distribution stays close to that of all, by the log-determinant of their covariance."""

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        return transport_order(visual.embeddings, num_keep).sort(dim=1).values
