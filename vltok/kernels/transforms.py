"""Where custom operations must step aside: they hide what is inside them from torch.func and from forward-mode."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether a torch.func transform is active, or a tensor carries a forward-mode derivative.

    A custom operation drops such a derivative without a word, so that plain algebra has to run instead.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
