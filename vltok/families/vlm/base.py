"""VlmFamily, the base of the vision-language families: where the parts of such a model are.

What a model shows by itself is read from it. A family says only what can't be seen.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index

from vltok.edits import Edits
from vltok.engine.features import KINDS, Encoding, pixel_keys
from vltok.engine.parts import attention_of, live
from vltok.engine.patches import Order, by_picture, token_values
from vltok.engine.pictures import Picture
from vltok.engine.projector import CoarserPatches, ProjectorChanges, swap_projector
from vltok.engine.tower_attention import can_be_read, unreadable_tower
from vltok.engine.tower_layout import patch_grid
from vltok.errors import UnsupportedModelError
from vltok.method import Run
from vltok.tokens import Grid3
from vltok.views import ProjectorSite, ScaleChoice
from vltok.visual import AttentionRequest

MERGING = ("llava", "vipllava")
PROJECTING = ("llava", "llava_next", "llava_onevision", "vipllava", "llava_next_video", "internvl")


class VlmFamily:
    """A family is stateless: everything it knows it reads from the model it is given."""

    name: ClassVar[str]
    title: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    # What an image is: an "entry" of the features, or as many as its pixels have tiles; a "run" of placeholders, of
    # whole entries; or a run of one of the entries that hold all images of a "row". Runs with at most `gap` words
    # between them are tiles of one image, and where an image is an entry, entries with at most so many are what was
    # filmed one after another in one video.
    unit: ClassVar[str] = "entry"
    gap: ClassVar[int] = 0
    # How the tower has the patches that visual tokens stand for; None where a token stands for none in particular.
    patches: ClassVar[Order | None] = None
    patch_counters: ClassVar[tuple[str, ...]] = ()  # methods of the model that count a picture's patches by its config

    # What people are told, see `vltok.families.support.ModelSupport`; tests hold it against tiny models.
    also: ClassVar[tuple[str, ...]] = ()
    videos: ClassVar[Literal["no", "yes", "frames"]] = "no"
    cls: ClassVar[str] = "no"
    axes: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    condensers: ClassVar[tuple[str, ...]] = ()
    real_processor: ClassVar[bool] = True
    refuses: ClassVar[str] = ""

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return live(model.vision_tower)

    def towers(self, model: nn.Module) -> list[nn.Module]:
        """All vision towers, of images and of videos."""
        return [self.tower(model)]

    def has_cls(self, model: nn.Module) -> bool:
        """Whether the vision tower has a [CLS] token whose attention can be read."""
        if not self.reads_attention:
            return False
        names = (name.rpartition(".")[2] for name, _ in self.tower(model).named_parameters())
        return any(name in ("class_embedding", "cls_token") for name in names)

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if this member of the family can't be handled."""

    def decoder(self, model: nn.Module) -> nn.Module:
        """The decoder that visual tokens enter, with its `layers`."""
        return model.language_model if hasattr(model, "language_model") else model.text_model

    def has_axes(self, model: nn.Module) -> bool:
        """Whether visual tokens have positions on several axes."""
        return hasattr(model, "get_rope_index")

    def marks(self, model: nn.Module) -> dict[str, int]:
        """The ids that stand for visual tokens in prompts, by what they stand for: "image", "video"."""
        names = [(kind, f"{kind}_token_{word}") for kind in KINDS for word in ("index", "id")]
        found = {kind: getattr(model.config, name, None) for kind, name in names if hasattr(model.config, name)}
        return {kind: mark for kind, mark in found.items() if mark is not None}

    def joins(self, words: list[int], end: int, begin: int) -> bool:
        """Whether two runs of placeholders are tiles of one image.

        Args:
            words: The prompt.
            end: Where the first run ends.
            begin: Where the second one begins.
        """
        return begin - end <= self.gap

    def picture_lengths(self, encoding: Encoding) -> list[int]:
        """Visual tokens of each image or video: of an entry, or of all its tiles or frames, as many as come together.

        No words tell tiles of one image from those of the next where the pixels say it: (images, tiles, 3, H, W).
        """
        lengths, shape = encoding.lengths, encoding.pixels_shape
        count = shape[1] if len(shape) == 5 and len(lengths) == shape[0] * shape[1] else 1
        return [sum(lengths[n : n + count]) for n in range(0, len(lengths), count)]

    def grid(self, model: nn.Module, encoding: Encoding, offset: int, length: int) -> tuple[int, int, int] | None:
        """Frames, rows and columns that some tokens of an encoding form, without what stands behind them; or None.

        Args:
            model: The model.
            encoding: The encoding.
            offset: The first of these tokens.
            length: How many there are.
        """
        begins = list(accumulate(encoding.lengths, initial=0))
        if offset not in begins or offset + length not in begins:
            return None
        first, last = begins.index(offset), begins.index(offset + length)
        if encoding.grids is not None and len(encoding.grids) == len(encoding.lengths):
            own = zip(encoding.grids[first:last], encoding.lengths[first:last], strict=True)
            parts = [_merged(grid, tokens, self._merge(model, encoding, first)) for grid, tokens in own]
            if None in parts or len({part[1:] for part in parts}) > 1 or (len(parts) > 1 and encoding.kind == "image"):
                return None
            return sum(part[0] for part in parts), *parts[0][1:]
        frames, behind, shape = 1, 0, encoding.pixels_shape
        if len(shape) < 4:  # patches
            return None
        height, width = shape[-2:]
        if encoding.kind == "video":
            is_entry = len(shape) == 5 and len(encoding.lengths) == shape[0]  # or its frames are
            frames, behind = (shape[1], 1) if is_entry else (last - first, 0)
        elif last != first + 1:
            return None
        elif (sizes := encoding.arguments.get("image_sizes")) is not None and len(sizes) == len(encoding.lengths):
            height, width = map(int, sizes[first])
        rows = round(math.sqrt(length // frames * height / width))
        columns = length // frames // max(1, rows)
        fits = rows * columns and length - frames * rows * columns in (0, behind)
        return (frames, rows, columns) if fits and abs(rows * width - columns * height) < max(height, width) else None

    def merge(self, model: nn.Module) -> int:
        """Patches along the side of what one visual token stands for, where grids of patches are passed in."""
        vision = model.config.vision_config
        names = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
        size = next((size for name in names if (size := getattr(vision, name, None))), 1)
        return size if isinstance(size, int) else size[0]

    def _merge(self, model: nn.Module, encoding: Encoding, entry: int) -> int:
        """The same for one entry: some models are told with each picture."""
        given = [value for name, value in encoding.arguments.items() if name.endswith("merge_sizes")]
        return int(given[0][entry]) if given and given[0] is not None else self.merge(model)

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        """Numbers made from the pixels, int64: of each picture, tile or frame, in the order of their tokens."""
        sizes = encoding.arguments.get("image_sizes")
        if encoding.grids is not None:
            # Rows of pixels are patches, or frames of patches.
            for rows in ([math.prod(grid) for grid in encoding.grids], [grid[0] for grid in encoding.grids]):
                if sum(rows) == len(pixels):
                    return torch.cat([pixel_keys(own.unsqueeze(0)) for own in pixels.split(rows)])
        if sizes is not None and len(sizes) == len(pixels) and pixels.dim() == 4:  # padded to the largest
            cut = [own[None, :, : int(h), : int(w)] for own, (h, w) in zip(pixels, sizes, strict=True)]
            return torch.cat([pixel_keys(own) for own in cut])
        if pixels.dim() == 5 and (self.unit == "row" or len(pixels) != len(encoding.lengths)):
            pixels, mask = pixels.flatten(0, 1), encoding.arguments.get("pixel_attention_mask")
            if self.unit == "row":  # padded with black tiles
                real = pixels.flatten(1).any(1)
                pixels = pixels[real]
                if mask is not None and mask.dim() == 4:  # of pixels, padded to the largest
                    mask = mask.flatten(0, 1)[real]
                    sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1).tolist()
                    cut = [own[None, :, :h, :w] for own, (h, w) in zip(pixels, sizes, strict=True)]
                    return torch.cat([pixel_keys(own) for own in cut])
        return pixel_keys(pixels)

    def projector(self, model: nn.Module) -> nn.Module | None:
        """What makes a visual token of each feature; None where it takes several for one, or more is done to them."""
        return None

    @property
    def reads_attention(self) -> bool:
        """Whether selectors may ask for attention in the vision tower: it is known which patches a token stands for."""
        return self.patches is not None

    def of_tokens(self, model: nn.Module, encoding: Encoding, name: str, fill: float) -> torch.Tensor:
        """What was read in the tower, for each visual token of the encoding.

        Args:
            model: The model.
            encoding: The encoding.
            name: What was read, see `Encoding.read`.
            fill: What tokens get that stand for no patch, such as the newline tokens of AnyRes layouts.

        Returns:
            Values of the tokens, (V, ...).
        """
        return self.of_projected(model, encoding, name, sum(encoding.lengths), fill)

    def of_projected(self, model: nn.Module, encoding: Encoding, name: str, count: int, fill: float) -> torch.Tensor:
        """The same for each of the `count` tokens that the projector returns, (count, ...)."""
        values, merges = encoding.of_tower(name), None
        if name == "inputs" and len(values) * values.shape[1] == count:
            return values.flatten(0, 1)
        if encoding.grids is not None:
            merges = [self._merge(model, encoding, entry) for entry in range(len(encoding.grids))]
        if self.patches == "windows":
            values = self._out_of_windows(model, encoding, values, merges[0])
        grids, has_padding = self.patch_grids(model, encoding, values)
        pictures = by_picture(values, grids, has_padding)
        if merges is None:
            patches = sum(math.prod(grid) for _, grid in pictures)
            merges = [math.isqrt(max(1, patches // max(1, count)))] * len(pictures)
        elif len(merges) < len(pictures):  # frames apart
            merges = [merge for merge, grid in zip(merges, grids, strict=True) for _ in range(grid[0])]
        return token_values(pictures, merges, self.patches, count, fill)

    def patch_grids(self, model: nn.Module, encoding: Encoding, values: torch.Tensor) -> tuple[list[Grid3], bool]:
        """Patches of the pictures that the tower saw, (R, S, ...), and whether rows may have padding behind them."""
        shapes, sizes = (encoding.arguments.get(name) for name in ("spatial_shapes", "image_sizes"))
        if encoding.grids is not None:
            return [tuple(grid) for grid in encoding.grids], True
        if shapes is not None:
            return [(1, *shape) for shape in shapes.tolist()], True
        side, (rows, length) = self.patch_size(model), values.shape[:2]
        own = [] if sizes is None else [(1, int(height) // side, int(width) // side) for height, width in sizes]
        if rows == 1 and length == sum(map(math.prod, own)):  # one after another, without what pads the pixels
            return own, False
        height, width = encoding.pixels_shape[-2:]
        return [(1, height // side, width // side)] * rows, False

    def _out_of_windows(self, model: nn.Module, encoding: Encoding, values: torch.Tensor, merge: int) -> torch.Tensor:
        """What was read in a tower that has its patches window by window, picture by picture, (1, patches, ...)."""
        tower = self.tower(model)
        order, _ = get_vision_window_index(
            torch.tensor(encoding.grids),
            spatial_merge_size=merge,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        blocks = values.reshape(-1, merge**2, *values.shape[2:])
        return blocks[order.argsort().to(values.device)].flatten(0, 1).unsqueeze(0)

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        """Which tokens of a picture show the whole of it, (N,), bool; None if all do."""
        return None

    def attention_modules(self, model: nn.Module, request: AttentionRequest) -> list[nn.Module]:
        """Find the attention module of a layer by its index, in each vision tower.

        Raises:
            UnsupportedModelError: If there is no attention to read, or no [CLS] token to ask for.
            ValueError: If there is no such layer.
        """
        self._check_patches()
        if request.kind == "cls" and not self.has_cls(model):
            raise UnsupportedModelError(
                f"{type(self.tower(model)).__name__} has no [CLS] token; use a method or pivot that needs none "
                "(for ToDRE pivot='center', 'farthest' or 'random'), or a model with a CLIP or InternViT tower"
            )
        found = []
        for tower in self.towers(model):
            layers = _blocks(tower)
            if not -len(layers) <= request.layer < len(layers):
                raise ValueError(f"the vision tower has {len(layers)} layers; there is no layer {request.layer}")
            attention = attention_of(layers[request.layer])
            if not can_be_read(attention):
                raise unreadable_tower(attention or layers[request.layer])
            found.append(attention)
        return found

    def feature_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block of each vision tower whose output goes on to the projector.

        Raises:
            UnsupportedModelError: If it is not known which patches a visual token stands for.
        """
        self._check_patches()
        level = getattr(model.config, "vision_feature_layer", None)
        level = level if isinstance(level, int) else -1
        return [_blocks(tower)[level if level < 0 else level - 1] for tower in self.towers(model)]

    def _check_patches(self) -> None:
        if self.patches is None:
            raise UnsupportedModelError(
                f"vltok can't tell which patches the visual tokens of {self.title} stand for, so it can't rank them by "
                "attention in the vision tower, or by anything else of it; choose a method that needs none, such as "
                "DivPrune, or ToDRE with pivot='center'"
            )

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        """Say where the projector stands.

        Raises:
            UnsupportedModelError: If this family's projector can't be replaced, or not in this member.
        """
        raise UnsupportedModelError(
            f"vltok doesn't know what the projector of {self.title} reads, or how its processor counts the tokens, so "
            f"it can't be replaced; families that can: {', '.join(PROJECTING)}"
        )

    def projector_changes(
        self, model: nn.Module, levels: tuple[int, ...], grid: tuple[int, int], scale_factor: int
    ) -> ProjectorChanges:
        """What follows a projector that reads these levels and makes a token of each s x s patches of this grid."""
        config, size = model.config, model.config.vision_config.patch_size
        strategy = config.vision_feature_select_strategy
        return ProjectorChanges(
            config={"vision_feature_layer": list(levels), **image_seq_length(config, grid, scale_factor)},
            counted={"patch_size": (size, size * scale_factor)},
            shared={"image_token_id": config.image_token_id, "vision_feature_select_strategy": strategy},
        )

    def swap_projector(
        self,
        edits: Edits,
        run: Run,
        model: nn.Module,
        processor: Any,
        projector: nn.Module,
        levels: tuple[int, ...],
        scales: ScaleChoice,
    ) -> dict[str, dict[str, Any]]:
        """Replace the projector, see `ProjectorView.swap_projector`. Returns what config and processor held before."""
        grid = patch_grid(model.config.vision_config)
        changes = {scale: self.projector_changes(model, levels, grid, scale) for scale in scales.every}
        before = swap_projector(edits, run, model, processor, projector, changes, scales)
        for name in self.patch_counters:
            edits.set_attribute(model, name, CoarserPatches(model, name, scales))
        self.follow_projector(edits, model, levels)
        return before

    def follow_projector(self, edits: Edits, model: nn.Module, levels: tuple[int, ...]) -> None:
        """Change what else stands around a projector that was replaced by one that reads these levels."""

    def merging_changes(self, model: nn.Module, num_merged: int) -> ProjectorChanges:
        """What follows a vision tower that hands on `num_merged` tokens fewer than there are patches.

        Raises:
            UnsupportedModelError: If what stands behind the tower needs a grid of patches.
        """
        raise UnsupportedModelError(
            f"what stands behind the vision tower of {self.title} lays its tokens out as a grid, or vltok doesn't know "
            f"that it needs none, so they can't be merged; families whose tokens can: {', '.join(MERGING)}"
        )

    def patch_size(self, model: nn.Module) -> int:
        """Side of a patch in pixels."""
        size = self.tower(model).config.patch_size
        return size if isinstance(size, int) else size[0]


def _blocks(tower: nn.Module) -> nn.ModuleList:
    return max((module for module in tower.modules() if isinstance(module, nn.ModuleList)), key=len)


def image_seq_length(config: Any, grid: tuple[int, int], scale_factor: int) -> dict[str, int]:
    """The field of a config that says how many tokens a picture has, for s^2 times fewer; none where there is none."""
    fewer = grid[0] * grid[1] // scale_factor**2
    return {"image_seq_length": fewer} if hasattr(config, "image_seq_length") else {}


def _merged(grid: list[int], length: int, merge: int) -> tuple[int, int, int] | None:
    """A grid of patches as one of visual tokens, where it has `length` of these; frames may be pooled into one."""
    rows, columns = grid[1] // merge, grid[2] // merge
    frames = length // (rows * columns) if rows * columns else 0
    return (frames, rows, columns) if frames in (1, grid[0]) and frames * rows * columns == length else None
