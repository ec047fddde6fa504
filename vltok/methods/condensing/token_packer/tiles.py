"""TokenPacker-HD: show a model a large picture as a grid of tiles and a thumbnail, each encoded as one image.

Paper: https://arxiv.org/abs/2407.02392, the part on high resolution. Grids, tiles and token order are those of the
released models. Differs from them on request: their thumbnail is the padded grid scaled down, so that the picture in it
comes out too small where there is padding; the sound one is the picture scaled down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from vltok.checks import check_choice
from vltok.tokens import Grid

Thumbnail = Literal["released", "sound"]

TILE, COMMA, NEWLINE, THUMBNAIL = "tile", ",", "\n", "thumbnail"  # what `tile_layout` is made of
MAX_TILES = (9, 16, 25)

# Grids (rows, columns) in the released order, which decides ties: a smaller budget has the first ones of a larger.
_GRIDS: tuple[Grid, ...] = (
    *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (1, 5), (5, 1), (1, 6), (6, 1)),
    *((2, 3), (3, 2), (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1)),
    *((2, 5), (5, 2), (2, 6), (6, 2), (3, 4), (4, 3), (2, 7), (7, 2), (3, 5), (5, 3), (2, 8), (8, 2), (4, 4)),
    *((3, 6), (6, 3), (2, 9), (9, 2), (4, 5), (5, 4), (2, 10), (10, 2), (3, 7), (7, 3), (11, 2), (2, 11)),
    *((4, 6), (6, 4), (12, 2), (2, 12), (3, 8), (8, 3), (4, 6), (6, 4), (5, 5)),
)
IOU_WEIGHT = 0.1
IOU_SCALE = 1.4  # a grid should be about this much larger than the picture, along each side
IOU_EPS = 1e-5


def candidate_grids(max_tiles: int) -> list[Grid]:
    """List the grids, (rows, columns), that a picture may be cut into, in the order that decides ties.

    Raises:
        ValueError: If `max_tiles` is not 9, 16 or 25.
    """
    if max_tiles not in MAX_TILES:
        raise ValueError(f"max_tiles must be one of {', '.join(map(str, MAX_TILES))}, got {max_tiles!r}")
    return [(rows, columns) for rows, columns in _GRIDS if rows * columns <= max_tiles]


def choose_grid(height: int, width: int, max_tiles: int = 9, tile: int = 336) -> Grid:
    """Choose the grid that a picture fills best and that is about as large as the picture.

    The score is the share of the grid that the picture fills when it is resized to fit, plus a tenth of the overlap
    (intersection over union) of the grid and the picture scaled by 1.4. The first of equal grids wins.

    Args:
        height: Of the picture, in pixels, at least 1.
        width: Of the picture, in pixels, at least 1.
        max_tiles: The most tiles, 9, 16 or 25.
        tile: Side of a tile in pixels.

    Returns:
        (rows, columns).

    Raises:
        ValueError: If a size is not positive or `max_tiles` unknown.
    """
    grids = candidate_grids(max_tiles)
    if min(height, width, tile) < 1:
        raise ValueError(f"height, width and tile must be at least 1, got {height}, {width} and {tile}")
    options = {"dtype": torch.float32, "device": "cpu"}  # whatever the default is: a few numbers
    boxes = torch.tensor(grids, **options) * tile  # (G, 2), in pixels
    picture = torch.tensor([height, width], **options)
    scale = (boxes / picture).amin(1, keepdim=True)
    area = boxes.prod(1)
    filled = (picture * scale).round().prod(1) / area
    larger = picture * IOU_SCALE
    overlap = torch.minimum(boxes, larger).prod(1)
    iou = overlap / (area + larger.prod() - overlap + IOU_EPS)
    return grids[int((filled + IOU_WEIGHT * iou).argmax())]


def slice_image(image: torch.Tensor, grid: Grid, tile: int = 336, thumbnail: Thumbnail = "released") -> torch.Tensor:
    """Cut a picture into tiles, and add a thumbnail if there are several.

    The picture is resized to fit the grid, keeping its aspect ratio, and put into the top left corner; the rest is 0.

    Args:
        image: The normalised picture, (3, H, W), a float dtype.
        grid: (rows, columns).
        tile: Side of a tile in pixels.
        thumbnail: "released" resizes the padded grid of tiles to the thumbnail's size, "sound" the picture.

    Returns:
        Tiles row by row, then the thumbnail, (n, 3, tile, tile); n = 1 for a single tile, else rows * columns + 1.

    Raises:
        TypeError: If `image` is not of a float dtype.
        ValueError: If a shape or size is not as said above, or `thumbnail` is unknown.
    """
    from einops import rearrange  # here, so that `import vltok` loads torch alone

    check_choice("thumbnail", thumbnail, Thumbnail)
    if not image.is_floating_point():
        raise TypeError(f"image must be normalised and of a float dtype, got {image.dtype}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (3, H, W), got {tuple(image.shape)}")
    rows, columns = _checked(grid)
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    size = image.shape[1:]
    canvas = _fit(image, size, (rows * tile, columns * tile))
    tiles = rearrange(canvas, "c (rows h) (columns w) -> (rows columns) c h w", h=tile, w=tile)
    if rows * columns == 1:
        return tiles
    overview = _fit(canvas if thumbnail == "released" else image, size, (tile, tile))
    return torch.cat([tiles, overview.unsqueeze(0)])


def _fit(pixels: torch.Tensor, size: Sequence[int], box: tuple[int, int]) -> torch.Tensor:
    """Resize pixels to what a picture of `size` measures when it just fits the box, and fill up with 0."""
    ratios = [outer / inner for outer, inner in zip(box, size, strict=True)]
    fitted = [max(1, min(outer, round(inner * min(ratios)))) for outer, inner in zip(box, size, strict=True)]
    tight = ratios.index(min(ratios))
    fitted[tight] = box[tight]
    resized = F.interpolate(pixels.unsqueeze(0), size=fitted, mode="bilinear", align_corners=False)[0]
    return F.pad(resized, (0, box[1] - fitted[1], 0, box[0] - fitted[0]))


def tile_layout(grid: Grid) -> list[str]:
    r"""Say in which order tiles and separators follow each other: "tile", ",", "\n" and "thumbnail".

    The tiles of a row are separated by commas and a newline ends each row; the thumbnail of several tiles and a newline
    come last. Tiles and thumbnail are in the order of `slice_image`.

    Raises:
        ValueError: If the grid has no rows or columns.
    """
    rows, columns = _checked(grid)
    row = [TILE, *[COMMA, TILE] * (columns - 1), NEWLINE]
    return row * rows + ([THUMBNAIL, NEWLINE] if rows * columns > 1 else [])


def picture_ids(grid: Grid, tokens_per_tile: int, image_token_id: int, separator_ids: tuple[int, int]) -> list[int]:
    """Write the token ids of one picture: a placeholder for each visual token, and the separators.

    Args:
        grid: (rows, columns).
        tokens_per_tile: Visual tokens of one tile, Q.
        image_token_id: The placeholder.
        separator_ids: Ids of comma and newline.

    Returns:
        rows * columns * Q + rows * (columns - 1) + rows ids, and Q + 1 more for the thumbnail of several tiles.
    """
    parts = {COMMA: [separator_ids[0]], NEWLINE: [separator_ids[1]]}
    placeholders = [image_token_id] * tokens_per_tile
    return [token for part in tile_layout(grid) for token in parts.get(part, placeholders)]


def expand_placeholders(
    ids: Sequence[int], image_token_id: int, pictures: Iterable[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Put the ids of pictures into a prompt that has one placeholder for each.

    Args:
        ids: The prompt.
        image_token_id: The placeholder.
        pictures: Ids of each picture, see `picture_ids`, in the order of the placeholders.

    Returns:
        The longer prompt, and for each of its positions the position in `ids` that it came from. What `ids` has beside
        it, such as a mask or labels, follows by gathering; all of a picture comes from its placeholder.

    Raises:
        ValueError: If there are more or fewer pictures than placeholders.
    """
    pictures = list(pictures)
    placeholders = sum(token == image_token_id for token in ids)
    if placeholders != len(pictures):
        raise ValueError(f"the prompt has {placeholders} placeholders, but {len(pictures)} images came")
    queue = iter(pictures)
    parts = [next(queue) if token == image_token_id else (token,) for token in ids]
    source = [position for position, part in enumerate(parts) for _ in part]
    return [token for part in parts for token in part], source


def _checked(grid: Grid) -> Grid:
    rows, columns = grid
    if min(rows, columns) < 1:
        raise ValueError(f"grid must be (rows, columns) of at least 1 each, got {tuple(grid)}")
    return rows, columns
