"""ADL: while a ViT trains, a loss that keeps its tokens from all attending to the same few.

Paper: https://arxiv.org/abs/2303.11126. Differs from the released code: the loss of a single picture counts too (there
it is 0), and probabilities are computed from queries and keys, so that the model's own attention stays fused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from vltok.checks import Blocks, check_blocks, chosen_blocks, is_number
from vltok.edits import Edits
from vltok.errors import UnsupportedInputError
from vltok.method import Method, Run, register
from vltok.methods.adl.diversification import attention_diversification_loss, score_diversification_loss
from vltok.recompute import is_recomputing
from vltok.report import Diversification
from vltok.views import VisionHost

MOST_TALLIES = 2  # of calls under way in a thread, besides the newest


@register("adl")
@dataclass(frozen=True)
class ADL(Method):
    """Attention diversification loss: add `handle.loss()` to the loss that a model is trained with.

    It changes nothing that the model computes, and does nothing in eval mode.

    Attributes:
        weight: What `handle.loss()` multiplies the loss by.
        threshold: Attention counts where it exceeds this over the number of tokens, above 0.
        blocks: Which blocks, as (start, stop) of a Python range: (0, 6) the first six, (-2, None) the last two. All by
            default.
    """

    training_free: ClassVar[bool] = False

    weight: float = 1.0
    threshold: float = 2.0
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "threshold"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (name == "threshold" and value == 0):
                least = "above" if name == "threshold" else "at least"
                raise ValueError(f"{name} must be finite and {least} 0, got {value}")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def settled(self, view: VisionHost) -> ADL:
        return replace(self, blocks=chosen_blocks(self.blocks, view.vision.depth))

    def attach(self, view: VisionHost, edits: Edits, run: Run) -> None:
        blocks = self.settled(view).blocks
        run.fact("diversification", Diversification(blocks))
        view.vision.watch_scores(edits, range(*blocks), _Losses(run, blocks, self.weight, self.threshold))


class _Tally:
    """The losses of one call, by block."""

    __slots__ = ("call", "losses")

    def __init__(self, call: object) -> None:
        self.call = call
        self.losses: dict[int, torch.Tensor] = {}


class _Losses:
    """Collects the losses of the blocks while pictures pass through the tower.

    A call that runs inside another has a tally of its own. Losses with their graphs keep the tensors of their call
    alive, so a tally goes when its call is over, and few are kept of calls that never came to an end.
    """

    def __init__(self, run: Run, blocks: tuple[int, int], weight: float, threshold: float) -> None:
        self.run = run
        self.blocks = blocks
        self.weight = weight
        self.threshold = threshold
        self._start_empty()

    def _start_empty(self) -> None:
        self._thread = threading.local()  # tallies: of the calls under way in this thread, innermost last
        self._blind: WeakKeyDictionary[object, set[int]] = WeakKeyDictionary()  # blocks counted without a graph
        self._last_blind: set[int] = set()  # those of the call that started last

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("run", "blocks", "weight", "threshold")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()

    def start(self, call: object) -> None:
        if is_recomputing():
            return
        if not torch.compiler.is_compiling():
            self._last_blind = self._blind[call] = set()
        self._thread.tallies = [*self._tallies()[-MOST_TALLIES:], _Tally(call)]
        self._publish({})

    def see(self, call: object, block: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        losses = [score_diversification_loss(query, key, scale, self.threshold) for query, key in pairs]
        pictures = [len(query) for query, _ in pairs]
        mean = sum(loss * count for loss, count in zip(losses, pictures, strict=True)) / sum(pictures)
        self._count(call, block, mean if len(losses) > 1 else losses[0])

    def see_map(self, call: object, block: int, attention: torch.Tensor) -> None:
        self._count(call, block, attention_diversification_loss(attention, self.threshold))

    def drop(self, call: object) -> None:
        self._thread.tallies = [each for each in self._tallies() if each.call is not call]

    def finish(self, call: object) -> None:
        if is_recomputing():
            return
        # A call inside this one may have left its own losses, or none, where those of the last call are looked up.
        self._publish(self._tally(call).losses)
        self.drop(call)

    def _count(self, call: object, block: int, loss: torch.Tensor) -> None:
        # A backward pass that recomputes this block needs the loss to be computed again, and not to be counted again.
        if is_recomputing():
            blind = self._last_blind if call is None else self._blind.get(call, self._last_blind)
            if loss.requires_grad and block in blind:
                raise UnsupportedInputError(
                    "reentrant gradient checkpointing makes attention without a graph first, so the attention "
                    "diversification loss would train nothing; use the other kind, use_reentrant=False"
                )
            return
        if call is not None and not loss.requires_grad and not torch.compiler.is_compiling():
            self._blind.setdefault(call, set()).add(block)
        tally = self._tally(call)
        tally.losses[block] = loss
        self._publish(tally.losses)

    def _tallies(self) -> list[_Tally]:
        return getattr(self._thread, "tallies", [])

    def _tally(self, call: object) -> _Tally:
        found = next((each for each in self._tallies() if each.call is call), None)
        if found is None:  # the blocks were called without the patches
            found = _Tally(call)
            self._thread.tallies = [*self._tallies()[-MOST_TALLIES:], found]
        return found

    def _publish(self, losses: dict[int, torch.Tensor]) -> None:
        if not losses:
            self.run.loss("adl", torch.zeros(()))
            return
        mean = sum(losses.values()) / (self.blocks[1] - self.blocks[0])
        self.run.loss("adl", self.weight * mean)
        values = tuple(each.detach() for _, each in sorted(losses.items()))
        self.run.report("diversification", Diversification(self.blocks, values))
