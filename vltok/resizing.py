"""resize() lets a processor see fewer pixels, so that vision tower and language model both have less to do.

It is the floor at equal cost for methods that prune visual tokens. Training-free.

A picture goes through the processor's own rules, which say how many visual tokens it has for a picture of this size.
resize() tries sizes on these rules, with pictures that have a size and no pixels, and then really shrinks the picture
to the size that gives the most tokens that the budget allows:

    image 480 x 640 -> rules: 15 x 20 = 300 tokens
    keep_ratio=0.5  -> try 256 x 320: 80; ... 320 x 448: 140; 320 x 480: 150 -> shrink to 320 x 480
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vltok.checks import check_budget
from vltok.edits import Edits, MethodWrapper
from vltok.errors import EditConflictError, UnsupportedInputError, UnsupportedModelError

_RULES, _SETTINGS = "_preprocess", "to_dict"  # of the image and the video processor
_PROBES = ((1024, 1024), (64, 48), (300, 1000), (1000, 480))  # heights and widths, of several shapes
_SOFT_TOKENS = (70, 140, 280, 560, 1120)  # all that Gemma 4 takes
_LEAST = 1 / 64  # how far a side is shrunk at most
_NO_LIMIT = 2**40  # pixels
_MOST_PIXELS = 4096  # on a side, to see whether size matters
Size = tuple[int, int]  # height and width in pixels


def resize(processor: Any, keep_ratio: float) -> Resizing:
    """Let a processor make fewer visual tokens of every image and video, from a smaller picture.

    with vltok.resize(processor, keep_ratio=0.25):
        inputs = processor(images=images, text=prompts, return_tensors="pt")

    Each image has at most `keep_ratio` times the tokens that it would have otherwise, and as many as sizes of about its
    shape can have: with a grid of H x W tokens, less than a row and a column fewer. Models of tiles have whole tiles,
    in a layout near the image's shape. A picture that would have fewer than the processor's fewest has these. Words
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
    if any(part is not None and isinstance(vars(part).get(_RULES), MethodWrapper) for part in parts.values()):
        raise EditConflictError(f"this {type(processor).__name__} is resizing already; remove that handle first")
    tokens = _tokens_of(processor)
    edits = Edits()
    for name, part in parts.items():
        if part is not None:
            edits.wrap_method(part, _RULES, _Shrink(name, keep_ratio, tokens))
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


def _tokens_of(processor: Any) -> _Tokens:
    """Say how to count visual tokens.

    Raises:
        UnsupportedModelError: If the size of an image doesn't say how many it has.
    """
    name, part = type(processor).__name__, processor.image_processor
    for layouts in ("image_grid_pinpoints", "split_resolutions"):
        if getattr(part, layouts, None):
            raise UnsupportedModelError(
                f"{name} lays images out in one of a few ways ({layouts}) that the model knows, so that smaller ones "
                "don't have fewer tokens in proportion; prune visual tokens instead"
            )
    if hasattr(part, "max_num_tiles"):
        raise UnsupportedModelError(
            f"{name} makes as many tiles as it may of an image of any size; lower max_num_tiles of its image processor"
        )
    if not callable(getattr(part, _RULES, None)) or not callable(getattr(processor, "_process_images", None)):
        raise UnsupportedModelError(
            f"{name} prepares images in a way of its own, in which vltok can't see what their size changes; prune "
            "visual tokens instead"
        )
    merged = processor._merge_kwargs(
        processor.valid_processor_kwargs,
        tokenizer_init_kwargs=getattr(getattr(processor, "tokenizer", None), "init_kwargs", {}),
        return_tensors="pt",
    )
    options = merged["images_kwargs"]
    words = "use_image_special_tokens"  # that of LFM2-VL is no setting of images, but goes with them
    if words in {**merged, **merged["text_kwargs"]}:
        options[words] = True
    texts: list[str] = []
    for size in _PROBES:
        try:
            made, own = processor._process_images([torch.zeros(3, *size, dtype=torch.uint8)], **options)
        except NotImplementedError:  # its prompts don't follow its images
            break
        texts += own
    if len(set(map(len, texts))) < 2:
        raise UnsupportedModelError(
            f"images have as many visual tokens with {name} as it is set, whatever size they are, so smaller ones "
            "change nothing; prune visual tokens instead"
        )
    side = processor.patch_size * processor.spatial_merge_size if hasattr(processor, "spatial_merge_size") else None
    if "image_grid_thw" in made and hasattr(part, "merge_size"):
        rows, columns = (int(patches) // part.merge_size for patches in made["image_grid_thw"][0][1:])
        ends = texts[-1].count(processor.image_token) - rows * columns
        return _Tokens(side, ends >= rows)
    return _Tokens(side)


@dataclass(frozen=True)
class _Tokens:
    """Counts what is proportional to visual tokens.

    Attributes:
        side: Pixels on a side of a token, if the processor knows it and the image processor doesn't.
        ends_rows: Whether each row of tokens has one more.
    """

    side: int | None = None
    ends_rows: bool = False

    def __call__(self, output: Mapping[str, Any], merge_size: int | None) -> int:
        """The count for the picture of which the rules made this."""
        for name, value in output.items():
            if name.startswith("num_soft_tokens"):
                return int(value[0])
            if name == "spatial_shapes":
                return int(torch.as_tensor(value).prod(-1).sum())
            if name == "image_sizes" and self.side:
                return math.prod(int(pixels) // self.side for pixels in value[0])
            if name == "image_grid_thw" and self.ends_rows:
                rows, columns = (int(patches) // merge_size for patches in value[0][1:])
                return rows * (columns + 1) + 2
        pixels = [value for name, value in output.items() if name.startswith("pixel_values")]
        return sum(math.prod(leaf.shape) for leaf in _leaves(pixels))


class _Hide(MethodWrapper):
    """Leaves resizing out of what a processor says of its settings."""

    def around(self, call: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in call(*args, **kwargs).items() if name not in (_RULES, _SETTINGS)}


class _Shrink(MethodWrapper):
    """Shrinks pictures, which are decoded, sampled and channels first, before a processor's rules see them.

    Args:
        kind: "images" or "videos".
        keep_ratio: Share of their visual tokens to keep.
        tokens: How to count these.
    """

    def __init__(self, kind: str, keep_ratio: float, tokens: _Tokens) -> None:
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

        rules = _Rules(rule, kwargs, self.tokens)
        plans: dict[tuple[int, ...], _Plan] = {}
        for picture in _leaves(pictures):
            shape = tuple(picture.shape)
            if shape not in plans:
                plans[shape] = rules.plan(picture, self.keep_ratio)
                if plans[shape].is_fixed and self.kind == "videos":
                    raise UnsupportedInputError(
                        f"videos have as many visual tokens with {type(self.owner).__name__}, whatever size they are, "
                        "so smaller ones change nothing; give fewer frames, or remove the handle of vltok.resize"
                    )
        small = _map(lambda picture: _shrunk(picture, plans[tuple(picture.shape)].size), pictures)
        return call(small, *args, **rules.settings([plan.cost for plan in plans.values()]))


@dataclass(frozen=True)
class _Plan:
    """What becomes of a picture: its size then, what it costs then, and whether that is so whatever size it has."""

    size: Size
    cost: int
    is_fixed: bool = False


class _Rules:
    """The rules of a processor with the settings of a call.

    Args:
        call: Applies the rules, with these settings, to a picture.
        options: The settings of the call.
        tokens: How to count visual tokens.
    """

    def __init__(
        self, call: Callable[[Any, dict[str, Any]], Mapping[str, Any]], options: dict[str, Any], tokens: _Tokens
    ) -> None:
        self.call = call
        self.options = options
        self.free = _free(options)
        self.tokens = tokens
        cell = options.get("merge_size") or options.get("pooling_kernel_size")
        # Of a picture that is made of whole tokens, the rules leave the size as it is.
        self.unit = tokens.side or (cell * options["patch_size"] if cell else 1)

    def settings(self, costs: list[int]) -> dict[str, Any]:
        """The settings for pictures that were shrunk to what costs that much."""
        settings = {**self.options, **self.free}
        if costs and settings.get("max_soft_tokens"):  # pictures are padded to this in the vision tower
            settings["max_soft_tokens"] = min(count for count in _SOFT_TOKENS if count >= max(costs))
        return settings

    def plan(self, picture: Any, keep_ratio: float) -> _Plan:
        """Find the size with the most tokens that a share of the picture's tokens allows, or with the fewest."""
        own: Size = tuple(picture.shape[-2:])
        known: dict[Size, int] = {}

        def cost(size: Size) -> int:
            if size not in known:
                known[size] = self._cost(_blank(picture, size), {**self.options, **self.free})
            return known[size]

        def scaled(scale: float) -> Size:
            height, width = (max(1, round(side * scale / self.unit)) * self.unit for side in own)
            return height, width

        whole = self._cost(_blank(picture, own), self.options)
        target = keep_ratio * whole * (1 + 1e-9)  # a product such as 0.29 * 100 lies below the integer it means
        layout = self._layout(own, target, cost)
        fewest = min([scaled(_LEAST), *layout], key=cost)
        if cost(fewest) >= whole:
            if cost(scaled(_MOST_PIXELS / max(own))) == whole:
                return _Plan(own, whole, is_fixed=True)
            if not self.free:
                return _Plan(own, whole)
        target = max(target, cost(fewest))
        found = [size for size in (fewest, *layout) if cost(size) <= target]
        if cost(scaled(_LEAST)) <= target:
            height, width = self._largest(scaled, lambda size: cost(size) <= target)
            wider = [(height, width), (height, width + self.unit), (height + self.unit, width)]
            found += [size for size in wider if cost(size) <= target]
        best = max(found, key=cost)
        best = max((size for size in found if cost(size) == cost(best)), key=math.prod)
        return _Plan(best, cost(best))

    def _cost(self, picture: Any, settings: dict[str, Any]) -> int:
        if "use_token_compression" in settings:  # which leaves out what is alike in pixels
            settings = {**settings, "use_token_compression": False}
        return self.tokens(self.call(picture, settings), self.options.get("merge_size"))

    @staticmethod
    def _largest(scaled: Callable[[float], Size], fits: Callable[[Size], bool]) -> Size:
        """The largest scale of a picture that fits, up to 0.4 %."""
        low, high = _LEAST, 1.0
        while high < 64 and fits(scaled(high)):  # the rules make small pictures larger
            low, high = high, 2 * high
        while high > 1.004 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
        return scaled(low)

    def _layout(self, own: Size, target: float, cost: Callable[[Size], int]) -> list[Size]:
        """The size of whole tiles that is most like the picture's shape, and those of one and two tiles.

        Of the layouts that the target allows, those that cost less than half of it are left out. Nothing if pictures
        are not cut into tiles.
        """
        options, size = self.options, self.options.get("size")
        if options.get("crop_to_patches"):
            height, width, most = size.height, size.width, options["max_patches"]
        elif options.get("tile_size"):
            height = width = options["tile_size"] * 17 // 16  # only what is larger than two tiles is cut up
            most = options["max_tiles"]
        elif "do_resize" in self.free and "max_image_size" in options:
            height = width = options["max_image_size"]["longest_edge"]
            most = math.ceil(size.longest_edge / height) ** 2
        else:
            return []
        one = min(cost((height, width)), cost((3 * height, width)) / 4)  # with the whole picture besides
        grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        grids = [grid for grid in grids if math.prod(grid) * one <= 2 * target]

        def slant(grid: tuple[int, int]) -> tuple[float, int]:
            shape = grid[0] * height * own[1], grid[1] * width * own[0]
            return max(shape) / min(shape), -math.prod(grid)

        sizes = [(rows * height, columns * width) for rows, columns in sorted(grids, key=slant)]
        near = next((each for each in sizes if target / 2 <= cost(each) <= target), None)
        few = [(rows * height, columns * width) for rows, columns in sorted([(1, 1), (1, 2), (2, 1)], key=slant)]
        return few if near is None else [near, *few]


def _free(options: dict[str, Any]) -> dict[str, Any]:
    """Settings with which the size of a picture alone says how many tokens it has, from one on."""
    size = options.get("size")
    is_cut = options.get("do_image_splitting") and getattr(size, "longest_edge", None)
    if options.get("max_soft_tokens") or is_cut:
        return {"do_resize": False}  # else it would be made as large as allowed, whatever it was
    if options.get("merge_size") and getattr(size, "shortest_edge", None):  # these are pixels, and no edges
        return {"size": replace(size, shortest_edge=1, longest_edge=_NO_LIMIT)}
    limits = {"min_pixels": 1, "max_pixels": _NO_LIMIT, "min_image_tokens": 1}
    return {name: value for name, value in limits.items() if options.get(name)}


def _blank(picture: Any, size: Size) -> Any:
    """A picture or video like this one, but of another size; a tensor without pixels, as no rule looks at them."""
    shape = (*picture.shape[:-2], *size)
    if isinstance(picture, torch.Tensor):
        return picture.new_empty(shape, device="meta")
    return torch.zeros(shape, dtype=torch.from_numpy(picture).dtype).numpy()


def _shrunk(picture: Any, size: Size) -> Any:
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


def _leaves(values: Any) -> Iterator[Any]:
    """What has a shape in lists of lists."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value)
    else:
        yield values


def _map(change: Callable[[Any], Any], values: Any) -> Any:
    return [_map(change, value) for value in values] if isinstance(values, list | tuple) else change(values)
