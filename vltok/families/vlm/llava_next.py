"""LLaVA-NeXT: a thumbnail and AnyRes crops of each picture, laid out as one map with a newline after every row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vltok.edits import Edits
from vltok.engine.features import Encoding, ImageTokens, VisionRecorder
from vltok.errors import UnsupportedInputError
from vltok.families.vlm.llava import Llava


class LlavaNext(Llava):
    """How LLaVA-NeXT is put together."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    model_classes = ("LlavaNextModel",)
    patch_counters = ("pack_image_features",)

    def watch_vision(self, edits: Edits, model: nn.Module, recorder: VisionRecorder) -> None:
        super().watch_vision(edits, model, recorder)
        # The sizes of the pictures decide the layout, and pass through no module, only through this method.
        edits.set_attribute(model, "get_image_features", Overheard(model, "get_image_features", recorder.overhear))

    def images(self, model: nn.Module, encoding: Encoding, runs: list[int]) -> list[ImageTokens]:
        sizes = encoding.extras.get("image_sizes")
        if sizes is None:
            raise UnsupportedInputError("the sizes of the pictures are not known; pass pixel_values and image_sizes")
        rows, length = encoding.features.shape[:2]
        config = model.config
        crops = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in sizes
        ]
        # The model itself says where each row of features goes: it packs their numbers in the place of the features.
        numbers = torch.arange(rows * length, dtype=torch.float64).view(rows, length, 1).split(crops)
        strategy = config.vision_feature_select_strategy
        packed, _ = model.pack_image_features(numbers, sizes, strategy, image_newline=torch.full((1,), -1.0))
        attention = self.token_attention(model, encoding)
        images = []
        for number, own, row in zip(packed, crops, _starts(crops), strict=True):
            number = number.flatten().long()
            images.append(
                ImageTokens(
                    length=len(number),
                    key=encoding.keys[row : row + own].sum(),
                    attention=None if attention is None else _look_up(attention, number),
                    is_overview=(number >= row * length) & (number < (row + 1) * length),
                    first=row * length,
                )
            )
        return images


class Overheard:
    """A method of an object that tells `listener` its arguments and otherwise does what it always did.

    It looks the method up on its owner's class at each call, so a deepcopy of the owner calls its own.
    """

    def __init__(self, owner: object, name: str, listener: Callable[..., None]) -> None:
        method = getattr(owner, name)
        functools.update_wrapper(self, method)
        del self.__wrapped__  # it would keep the method bound to this owner in a copy
        self.__signature__ = inspect.signature(method)
        self._owner = owner
        self._listener = listener

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._listener(**self.__signature__.bind(*args, **kwargs).arguments)
        return getattr(type(self._owner), self.__name__)(self._owner, *args, **kwargs)


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _look_up(attention: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Attention of each packed token; -inf for newlines (number -1)."""
    flat = torch.cat([attention.flatten(), attention.new_full((1,), -torch.inf)])
    return flat[number.to(flat.device)]
