"""Visual tokens made up for selectors: sharpened, with near neighbours, and a question of another length each."""

from __future__ import annotations

from dataclasses import replace

import torch

from vltok.views import VisualTokens


def made_up(batch: int = 3, length: int = 24, width: int = 8, seed: int = 0, frames: int = 2) -> VisualTokens:
    """Tokens of `batch` images, with words between padding that is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres = 2 * draw(batch, 5, width) + 1
    which = torch.randint(5, (batch, length, 1), generator=generator).expand(-1, -1, width)
    embeddings = (centres.gather(1, which) + 0.7 * draw(batch, length, width)) * (0.2 + draw(batch, length, 1).abs())
    words = [1 + (seed + image) % 4 for image in range(batch)]
    text_mask = torch.stack([torch.arange(6).roll(image) < count for image, count in enumerate(words)])
    return VisualTokens(
        embeddings=embeddings,
        image_keys=torch.arange(batch),
        attention=None,
        is_overview=torch.ones(batch, length, dtype=torch.bool),
        grid=(frames, 1, length // frames) if length % frames == 0 else (1, 1, length),
        features=2 * draw(batch, length, 6),
        text=(draw(batch, 6, width) + 0.5).masked_fill(~text_mask.unsqueeze(2), torch.nan),
        text_mask=text_mask,
        clip_image=2 * draw(batch, length, 5),
        clip_text=draw(batch, 5),
    )


def alone(visual: VisualTokens, image: int) -> VisualTokens:
    """One image of a batch, with its words and no padding."""
    mask = visual.text_mask[image]
    return replace(
        visual,
        embeddings=visual.embeddings[image : image + 1],
        image_keys=visual.image_keys[image : image + 1],
        is_overview=visual.is_overview[image : image + 1],
        features=visual.features[image : image + 1],
        text=visual.text[image, mask].unsqueeze(0),
        text_mask=mask[mask].unsqueeze(0),
        clip_image=visual.clip_image[image : image + 1],
        clip_text=visual.clip_text[image : image + 1],
    )


def repeated(visual: VisualTokens, which: list[int]) -> VisualTokens:
    """The tokens `which` of every image, which may name one several times."""
    own = {name: getattr(visual, name)[:, which] for name in ("embeddings", "features", "clip_image")}
    return replace(visual, **own)
