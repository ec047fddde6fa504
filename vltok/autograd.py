"""Ways through autograd: when to leave its ordinary one, to hold less, and how to come back for a second derivative."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def runs_eagerly() -> bool:
    """Whether operations run one by one, recorded for autograd's reverse mode at most.

    If not, a compiler or exporter reads them, or they are transformed by torch.func or differentiated in forward mode.
    These see through PyTorch's own operations only; and a compiler plans by itself what to hold and what to recompute.
    """
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return not (torch.compiler.is_compiling() or is_forward_mode or torch._C._are_functorch_transforms_active())


def is_recorded() -> bool:
    """Whether autograd records operations that run eagerly."""
    return torch.is_grad_enabled() and runs_eagerly()


def recomputed(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """function(*inputs), of which autograd holds the inputs alone. A backward pass computes the rest again.

    Its last operation is not computed again if the derivative needs only what that read, as for a matrix product.
    """
    return checkpoint(function, *inputs, use_reentrant=False) if is_recorded() else function(*inputs)


def gradients_to_differentiate(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of function(*inputs), with a graph of their own, so that gradients of gradients are right."""
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which operations on the device of `x` keep the dtype of what they are given."""
    kind = x.device.type  # "meta" knows no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
