"""DecoderRule, the base of the methods that let visual tokens leave inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.edits import Edits
from vltok.method import Method, Run
from vltok.views import DecoderState, LanguageView


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
