"""What the vision side of a model leaves for a selector: features, attention and a key of each picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.attention import cls_attention, received_attention
from vltok.errors import UnsupportedModelError
from vltok.views import AttentionRequest


@dataclass
class Encoding:
    """The last images the vision tower encoded, in the tower's rows (an AnyRes image has several).

    Attributes:
        pixels_shape: Shape of the tower's input.
        keys: A number made from the pixels of each row, (R,), int64.
        features: Projected features, (R, N, D), or (tokens, D) where images differ in size.
        attention: The requested attention over the tower's tokens, (R, S) or (tokens,), float32.
        extras: What else the family needs, such as the sizes of the images.
    """

    pixels_shape: torch.Size
    keys: torch.Tensor
    features: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    is_open: bool = True


@dataclass
class ImageTokens:
    """One image as the language model sees it.

    Attributes:
        length: Its visual tokens, N.
        key: A number made from its pixels, (), int64.
        attention: The requested attention, (N,), float32, -inf for tokens that stand for no patch.
        is_overview: Which tokens show the whole picture, (N,), bool; None if all do.
        first: Row of the projected features (flattened to (tokens, D)) that its first token was made from.
    """

    length: int
    key: torch.Tensor
    attention: torch.Tensor | None
    is_overview: torch.Tensor | None
    first: int


def pixel_keys(pixels: torch.Tensor) -> torch.Tensor:
    """Hash the pixels of each row, (R, ...) -> (R,), int64: the same for equal values in any batch, on any device."""
    flat = pixels.detach().reshape(pixels.shape[0], -1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).long()
    weights = (torch.arange(bits.shape[1], device=bits.device) * 2 + 1) * 0x2545F4914F6CDD1D  # odd: no element is lost
    return (bits * weights).sum(1)


class VisionRecorder:
    """Watches a vision tower and its projector and keeps the encoding of the last images."""

    def __init__(self) -> None:
        self.encoding: Encoding | None = None
        self.extras: dict[str, Any] = {}
        self._query: torch.Tensor | None = None
        self._key: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionRecorder:
        copy = VisionRecorder()
        memo[id(self)] = copy
        return copy

    def watch(self, edits: Edits, tower: nn.Module, projector: nn.Module) -> None:
        """Record rows, keys and features of a tower that takes (R, 3, H, W)."""
        edits.before(tower, self._before_tower)
        edits.after(tower, self._after_tower)
        edits.after(projector, self._after_projector)

    def watch_attention(self, edits: Edits, attention: nn.Module, request: AttentionRequest) -> None:
        """Record the requested attention of one layer from its query and key projections alone.

        Raises:
            UnsupportedModelError: If the attention module has no separate query and key projections.
        """
        query = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None)
        key = getattr(attention, "k_norm", None) or getattr(attention, "k_proj", None)
        if query is None or key is None:
            raise UnsupportedModelError(
                f"{type(attention).__name__} has no q_proj and k_proj to read attention from; CLIP, SigLIP and "
                "InternVL vision towers have; choose a method that needs no vision attention, such as pivot='center'"
            )
        edits.after(query, self._after_query_cls if request.kind == "cls" else self._after_query)
        edits.after(key, self._after_key)
        edits.after(attention, self._after_cls if request.kind == "cls" else self._after_received)

    def begin(self, pixels: torch.Tensor, keys: torch.Tensor, **extras: Any) -> None:
        """Start the record of new images."""
        self.encoding = Encoding(pixels.shape, keys, extras={**self.extras, **extras})
        self.extras = {}

    def overhear(self, **arguments: Any) -> None:
        """Note the arguments images are encoded with, for the encoding that is about to begin."""
        self.extras = {"image_sizes": arguments.get("image_sizes")}

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        self.begin(pixels, pixel_keys(pixels))

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.encoding.is_open = False
        self._query = self._key = None

    def _after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if self.encoding is not None:
            self.encoding.features = output.detach()

    def _after_query_cls(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self._query = output.detach()[:, :1]

    def _after_query(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self._query = output.detach()

    def _after_key(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self._key = output.detach()

    def _after_cls(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._record(module, cls_attention)

    def _after_received(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._record(module, received_attention)

    def _record(self, module: nn.Module, attention: Callable[..., torch.Tensor]) -> None:
        if self.encoding is None or not self.encoding.is_open:  # a backward pass recomputing a checkpointed layer
            return
        heads = module.num_heads
        scale = getattr(module, "scale", None) or (self._key.shape[-1] // heads) ** -0.5
        with torch.no_grad(), torch.autocast(self._key.device.type, enabled=False):
            self.encoding.attention = attention(self._query, self._key, heads, scale)
