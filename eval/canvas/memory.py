"""Answer the same pictures under many methods without computing the same numbers again.

No method touches the first layers of the vision tower, so their outputs for a batch are computed once and replayed.
A replay needs an input that is equal in every element; anything else is computed.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

KEPT = 16  # inputs each module remembers: the batches of a chunk, with right and wrong pictures


class Remembered(nn.Module):
    """A module that replays its output for an input it has seen.

    Args:
        inner: A module in eval mode whose output depends on its first argument (or `hidden_states`) alone.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._seen: OrderedDict[tuple[torch.Size, float], tuple[torch.Tensor, Any]] = OrderedDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        key = (hidden.shape, hidden[..., 0].sum().item())
        if key in self._seen and torch.equal(self._seen[key][0], hidden):
            self._seen.move_to_end(key)
            return self._seen[key][1]
        output = self.inner(*args, **kwargs)
        self._seen[key] = (hidden, output)
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return output


@contextmanager
def early_layers_remembered(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Let attention and MLP of all but the last two tower layers replay what they computed, until the block ends."""
    layers = model.model.vision_tower.encoder.layers[:-2]
    before = [(layer, name, getattr(layer, name)) for layer in layers for name in ("self_attn", "mlp")]
    for layer, name, module in before:
        setattr(layer, name, Remembered(module))
    try:
        yield
    finally:
        for layer, name, module in before:
            setattr(layer, name, module)
