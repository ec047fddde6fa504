"""DecoderRule, the base of the methods that let visual tokens leave inside the decoder, and its two usual forms.

One budget after one layer is `RuleAtLayer`; budgets that shrink layer by layer are `RuleInStages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from vltok.checks import check_integer, check_one_budget, is_number
from vltok.edits import Edits
from vltok.method import Method, Run
from vltok.tokens import keep_count, share_of
from vltok.views import LanguageView
from vltok.visual import DecoderState


def layer_at(depth: float, num_layers: int) -> int:
    """Which layer a share of a decoder is: depth * L, rounded down, within 1..L - 1."""
    return max(1, min(num_layers - 1, share_of(num_layers, depth)))


@dataclass(frozen=True)
class DecoderRule(Method):
    """Say at some decoder layers which visual tokens go on to the layers behind.

    A rule defines `layers` and `keep`, pure functions; rows, masks, rotary positions and caches are the engine's work.
    It decides on the prompt: answers of training, drafts and what is generated never count.
    """

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Where to look: l means after the attention of the l-th of `num_layers` layers, for those behind it."""
        raise NotImplementedError(f"{type(self).__name__} must define layers()")

    def keep(self, state: DecoderState) -> torch.Tensor:
        """Say which tokens go on.

        Args:
            state: N samples of S tokens each.

        Returns:
            (N, S), bool. Only visual tokens can leave.
        """
        raise NotImplementedError(f"{type(self).__name__} must define keep()")

    def attach(self, view: LanguageView, edits: Edits, run: Run) -> None:
        view.on_decoder_layers(edits, run, self)


@dataclass(frozen=True)
class RuleAtLayer(DecoderRule):
    """A rule that lets visual tokens leave once.

    Attributes:
        keep_ratio: Share to keep of each image's visual tokens that entered the decoder, in (0, 1]. Exactly one of
            keep_ratio and num_keep.
        num_keep: Number of visual tokens to keep per image, at least 1.
        layer: After how many decoder layers the others leave, 1 up to one less than there are.
    """

    fixed: ClassVar[tuple[str, ...]] = ("layer",)  # it decides which layer is hooked

    keep_ratio: float | None = None
    num_keep: int | None = None
    layer: int = 2

    def __post_init__(self) -> None:
        check_one_budget(type(self).__name__, self.keep_ratio, self.num_keep)
        check_integer("layer", self.layer, least=1)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Where to look: after `layer`.

        Raises:
            ValueError: If no layer would be left behind it.
        """
        if self.layer >= num_layers:
            raise ValueError(
                f"layer={self.layer} leaves no layer of this decoder to run without the tokens that leave; it has "
                f"{num_layers}, so give one in 1..{num_layers - 1}"
            )
        return (self.layer,)

    def budgets(self, state: DecoderState) -> list[list[int]]:
        """How many visual tokens of each image of each sample go on."""
        return [[keep_count(n, self.keep_ratio, self.num_keep) for n in own] for own in state.image_lengths]


@dataclass(frozen=True)
class RuleInStages(DecoderRule):
    """A rule that lets visual tokens leave several times.

    Attributes:
        ratios: Shares to keep of each image's visual tokens that entered the decoder, in (0, 1], none above the one
            before it; counts are rounded down, to at least 1.
        depths: After which share of the decoder's layers each takes effect, in (0, 1), ascending. Where two fall on the
            same layer, as they may in a short decoder, the later one counts.
    """

    fixed: ClassVar[tuple[str, ...]] = ("depths",)  # they decide which layers are hooked

    ratios: tuple[float, ...] = ()
    depths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ratios", "depths"):
            value: Any = getattr(self, name)
            if not isinstance(value, list | tuple) or not value or not all(map(is_number, value)):
                raise TypeError(f"{name} must be numbers, one for each stage, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if len(self.ratios) != len(self.depths):
            raise ValueError(
                f"ratios and depths must be equally many, got {len(self.ratios)} and {len(self.depths)}; give one of "
                "each for every stage"
            )
        if not all(0 < ratio <= 1 for ratio in self.ratios) or any(a < b for a, b in pairwise(self.ratios)):
            raise ValueError(f"ratios must be shares in (0, 1], none above the one before it, got {self.ratios}")
        if not all(0 < depth < 1 for depth in self.depths) or any(a >= b for a, b in pairwise(self.depths)):
            raise ValueError(f"depths must be ascending shares of the layers in (0, 1), got {self.depths}")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Where to look: at each of `depths`, ascending, each layer once; nowhere in a decoder of one layer."""
        layers = {layer_at(depth, num_layers) for depth in self.depths}
        return tuple(sorted(layers)) if num_layers > 1 else ()

    def budgets(self, state: DecoderState) -> list[list[int]]:
        """How many visual tokens of each image of each sample go on."""
        reached = sum(layer_at(depth, state.num_layers) <= state.layer for depth in self.depths)
        ratio = self.ratios[max(1, reached) - 1]  # a decoder may attend in none but earlier layers
        return [[max(1, share_of(n, ratio)) for n in own] for own in state.image_lengths]
