"""Finds the size at which a processor makes the most visual tokens of a picture that a budget allows.

A picture goes through the processor's own rules, which say how many visual tokens it has for a picture of this size.
Sizes are tried on these rules, with pictures that have a size and no pixels:

    image 480 x 640 -> rules: 15 x 20 = 300 tokens
    keep_ratio=0.5  -> try 256 x 320: 80; ... 320 x 448: 140; 320 x 480: 150 is the one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vltok.errors import UnsupportedModelError

RULES = "_preprocess"  # of an image or video processor: what applies its rules to pictures that are channels first
_PROBES = ((1024, 1024), (64, 48), (300, 1000), (1000, 480))  # heights and widths, of several shapes
_SOFT_TOKENS = (70, 140, 280, 560, 1120)  # all that Gemma 4 takes
_LEAST = 1 / 64  # how far a side is shrunk at most
_NO_LIMIT = 2**40  # pixels
_MOST_PIXELS = 4096  # on a side, to see whether size matters
Size = tuple[int, int]  # height and width in pixels


def tokens_of(processor: Any) -> Tokens:
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
    if not callable(getattr(part, RULES, None)) or not callable(getattr(processor, "_process_images", None)):
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
        return Tokens(side, ends >= rows)
    return Tokens(side)


@dataclass(frozen=True)
class Tokens:
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
        return sum(math.prod(leaf.shape) for leaf in leaves(pixels))


@dataclass(frozen=True)
class Plan:
    """What becomes of a picture: its size then, what it costs then, and whether that is so whatever size it has."""

    size: Size
    cost: int
    is_fixed: bool = False


class Rules:
    """The rules of a processor with the settings of a call.

    Args:
        call: Applies the rules, with these settings, to a picture.
        options: The settings of the call.
        tokens: How to count visual tokens.
    """

    def __init__(
        self, call: Callable[[Any, dict[str, Any]], Mapping[str, Any]], options: dict[str, Any], tokens: Tokens
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

    def plan(self, picture: Any, keep_ratio: float) -> Plan:
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
                return Plan(own, whole, is_fixed=True)
            if not self.free:
                return Plan(own, whole)
        target = max(target, cost(fewest))
        found = [size for size in (fewest, *layout) if cost(size) <= target]
        if cost(scaled(_LEAST)) <= target:
            height, width = self._largest(scaled, lambda size: cost(size) <= target)
            wider = [(height, width), (height, width + self.unit), (height + self.unit, width)]
            found += [size for size in wider if cost(size) <= target]
        best = max(found, key=cost)
        best = max((size for size in found if cost(size) == cost(best)), key=math.prod)
        return Plan(best, cost(best))

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


def leaves(values: Any) -> Iterator[Any]:
    """What has a shape in lists of lists."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from leaves(value)
    else:
        yield values
