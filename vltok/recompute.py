"""What gradient checkpointing runs a second time, in a backward pass, and what must not happen twice there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

FORWARD = -1


def current_pass() -> int:
    """The number of the backward pass that is under way in this thread, FORWARD if there is none."""
    return FORWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_recomputing() -> bool:
    """Whether a backward pass is under way, so that a module that runs now has run before."""
    return current_pass() != FORWARD


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of a module's norms alone: what passes now is in them already."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.training and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # rather than not tracking, with which other tensors would be saved than before
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
