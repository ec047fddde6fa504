"""resize() lets a processor see fewer pixels, so that vision tower and language model both have less to do.

It is the floor at equal cost for methods that prune visual tokens. Training-free. Which size an image gets is found in
picture_sizes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vltok.checks import check_budget
from vltok.edits import Edits, MethodWrapper
from vltok.errors import EditConflictError, UnsupportedInputError
from vltok.picture_sizes import RULES, Plan, Rules, Size, Tokens, leaves, tokens_of

_SETTINGS = "to_dict"  # of an image or video processor: says what to save


def resize(processor: Any, keep_ratio: float) -> Resizing:
    """Let a processor make fewer visual tokens of every image and video, by making it smaller.

    with vltok.resize(processor, keep_ratio=0.25):
        inputs = processor(images=images, text=prompts, return_tensors="pt")

    Each image has at most `keep_ratio` times the tokens that it would have otherwise, and as many as sizes of about its
    shape can have: with a grid of H x W tokens, less than a row and a column fewer. Models of tiles have whole tiles,
    in a layout near the image's shape. An image that would have fewer than the processor's fewest has these. Words
    around visual tokens, such as row ends, are not counted. Frames of a video are shrunk alike, and none is left out.

    Works together with methods on the model, which prune what is left. The processor goes on doing this when it is
    copied or pickled, and `save_pretrained` doesn't write it down.

    Args:
        processor: The processor of a model that takes images of any size.
        keep_ratio: Share of the visual tokens to keep, in (0, 1].

    Returns:
        The handle that takes it off again; also a context manager.

    Raises:
        TypeError: If `processor` is no processor with an image processor of its own, or the ratio is no number.
        ValueError: If the ratio is out of range.
        UnsupportedModelError: If the images of this processor have as many tokens whatever size they are, or as many as
            one of a few layouts says.
        EditConflictError: If it is resizing already.
    """
    check_budget(keep_ratio, None)
    if keep_ratio is None:
        raise TypeError("keep_ratio must be a number in (0, 1], got None")
    own = getattr(processor, "__dict__", {})
    parts = {name: own.get(f"{name[:-1]}_processor") for name in ("images", "videos")}
    if parts["images"] is None or not callable(processor):
        raise TypeError(
            "resize() takes the processor of a vision-language model, with its image processor and tokenizer, got "
            f"{type(processor).__name__}"
        )
    if any(part is not None and isinstance(vars(part).get(RULES), MethodWrapper) for part in parts.values()):
        raise EditConflictError(f"this {type(processor).__name__} is resizing already; remove that handle first")
    tokens = tokens_of(processor)
    edits = Edits()
    for name, part in parts.items():
        if part is not None:
            edits.wrap_method(part, RULES, _Shrink(name, keep_ratio, tokens))
            edits.wrap_method(part, _SETTINGS, _Hide())
    return Resizing(processor, keep_ratio, edits)


class Resizing:
    """A processor that makes fewer visual tokens. Also a context manager: it ends with the block.

    Attributes:
        processor: The processor.
        keep_ratio: Share of the visual tokens that it makes.
    """

    def __init__(self, processor: Any, keep_ratio: float, edits: Edits) -> None:
        self.processor = processor
        self.keep_ratio = keep_ratio
        self._edits = edits

    @property
    def is_attached(self) -> bool:
        """Whether the processor is still resizing."""
        return len(self._edits) > 0

    def remove(self) -> None:
        """Let the processor be as it was. Does nothing the second time."""
        self._edits.undo()

    def __enter__(self) -> Resizing:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "removed"
        return f"Resizing({type(self.processor).__name__}, keep_ratio={self.keep_ratio}, {state})"


class _Hide(MethodWrapper):
    """Leaves resizing out of what a processor says of its settings."""

    def around(self, call: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in call(*args, **kwargs).items() if name not in (RULES, _SETTINGS)}


class _Shrink(MethodWrapper):
    """Shrinks pictures, which are decoded, sampled and channels first, before a processor's rules see them.

    Args:
        kind: "images" or "videos".
        keep_ratio: Share of their visual tokens to keep.
        tokens: How to count these.
    """

    def __init__(self, kind: str, keep_ratio: float, tokens: Tokens) -> None:
        self.kind = kind
        self.keep_ratio = keep_ratio
        self.tokens = tokens

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.keep_ratio == 1:
            return call(*args, **kwargs)
        pictures, args = (kwargs.pop(self.kind), args) if self.kind in kwargs else (args[0], args[1:])
        nests = any(isinstance(each, list) for each in pictures)

        def rule(picture: Any, settings: dict[str, Any]) -> Mapping[str, Any]:
            return call([[picture]] if nests else [picture], *args, **settings)

        rules = Rules(rule, kwargs, self.tokens)
        plans: dict[tuple[int, ...], Plan] = {}
        for picture in leaves(pictures):
            shape = tuple(picture.shape)
            if shape not in plans:
                plans[shape] = rules.plan(picture, self.keep_ratio)
                if plans[shape].is_fixed and self.kind == "videos":
                    raise UnsupportedInputError(
                        f"videos have as many visual tokens with {type(self.owner).__name__}, whatever size they are, "
                        "so smaller ones change nothing; give fewer frames, or remove the handle of vltok.resize"
                    )
        small = _map(lambda picture: shrunk(picture, plans[tuple(picture.shape)].size), pictures)
        return call(small, *args, **rules.settings([plan.cost for plan in plans.values()]))


def shrunk(picture: Any, size: Size) -> Any:
    """The picture or video, (..., C, H, W), tensor or array, in another size."""
    if tuple(picture.shape[-2:]) == size:
        return picture
    pixels = picture if isinstance(picture, torch.Tensor) else torch.from_numpy(picture)
    small = torch.stack([_shrunk_frame(frame, size) for frame in pixels.reshape(-1, *pixels.shape[-3:])])
    small = small.reshape(*pixels.shape[:-2], *size)
    return small if isinstance(picture, torch.Tensor) else small.numpy()


def _shrunk_frame(frame: torch.Tensor, size: Size) -> torch.Tensor:
    """One of the pictures of a video, (C, H, W), bicubic in float32, in its own dtype and range."""
    small = torch.nn.functional.interpolate(frame[None].float(), size, mode="bicubic", antialias=True)[0]
    small = small.clamp(float(frame.min()), float(frame.max()))  # bicubic weights overshoot
    return (small if frame.is_floating_point() else small.round()).to(frame.dtype)


def _map(change: Callable[[Any], Any], values: Any) -> Any:
    return [_map(change, value) for value in values] if isinstance(values, list | tuple) else change(values)
