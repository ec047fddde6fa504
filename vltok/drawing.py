"""Pictures of what a method kept: the patches of dropped visual tokens fade."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid3

_FADE = 0.8  # how far dropped patches go towards white
_EDGE = (200, 30, 30)


def draw_kept(image: Image.Image, kept: torch.Tensor, grid: Grid3 | None, size: int = 512) -> Image.Image:
    """Draw an image with the patches of dropped visual tokens faded, and a frame around each kept one.

    The grid is laid over the whole image, as for processors that resize it; what they crop is not known here.

    Args:
        image: The image as the processor got it.
        kept: Positions of the kept visual tokens in the grid, (K,), int64; larger ones, of tokens that stand for no
            patch, are left out. A report's `keep_indices` has them.
        grid: Frames, rows and columns (T, H, W) of the visual tokens, of a report's `grids`.
        size: Length of the drawing's longer side, in pixels.

    Raises:
        UnsupportedInputError: If the visual tokens form no grid, or several frames.
    """
    if grid is None or grid[0] != 1:
        raise UnsupportedInputError(f"visual tokens can be drawn on one image of a known grid, got the grid {grid}")
    _, rows, columns = grid
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    clear = image.convert("RGB").resize((width, height))
    drawn = Image.blend(clear, Image.new("RGB", clear.size, "white"), _FADE)
    pen = ImageDraw.Draw(drawn)
    for position in kept.tolist():
        row, column = divmod(position, columns)
        if row >= rows:
            continue
        box = (
            round(column * width / columns),
            round(row * height / rows),
            round((column + 1) * width / columns),
            round((row + 1) * height / rows),
        )
        drawn.paste(clear.crop(box), box)
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_EDGE)
    return drawn
