"""Visual tokens as a selector gets them, made by hand: with what the vision tower says, or with a question."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from vltok.visual import VisualTokens


def tower_tokens(batch: int = 3, length: int = 60, width: int = 24, newline: int = 0, seed: int = 0) -> VisualTokens:
    """Images with sharp attention and near doubles among features and keys.

    Args:
        batch: Images, B.
        length: Visual tokens, N.
        width: Of the features and keys, C, in 4 heads; embeddings have twice as much.
        newline: Every how many tokens one stands for no patch; 0 for none.
        seed: Another seed gives other images.
    """
    generator = torch.Generator().manual_seed(seed)

    def alike() -> torch.Tensor:
        """Tokens of a few kinds, with unequal norms."""
        kinds = torch.randn(batch, 9, width, generator=generator) + 0.5
        which = torch.randint(9, (batch, length, 1), generator=generator).expand(-1, -1, width)
        noise = 0.4 * torch.randn(batch, length, width, generator=generator)
        return (kinds.gather(1, which) + noise) * torch.rand(batch, length, 1, generator=generator).add(0.2)

    attention = (3 * torch.randn(batch, length, generator=generator)).softmax(1)
    features, keys = alike(), alike()
    if newline:
        attention[:, newline - 1 :: newline] = -torch.inf
        features[:, newline - 1 :: newline] = 0
        keys[:, newline - 1 :: newline] = 0
    return VisualTokens(
        embeddings=torch.randn(batch, length, 2 * width, generator=generator),
        image_keys=torch.arange(batch),
        attention=attention,
        is_overview=torch.ones(batch, length, dtype=torch.bool),
        features=features,
        can_project=True,
        keys=keys,
        num_heads=4,
    )


def only(visual: VisualTokens, *images: int) -> VisualTokens:
    """The same of some of the images alone."""
    tensors = {
        name: value[torch.tensor(images, dtype=torch.int64)]
        for name, value in vars(visual).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(visual, **tensors)


def cosines(tokens: torch.Tensor) -> torch.Tensor:
    """Of an image's tokens, (N, C), with each other by the definition, float64; a zero row is similar to none."""
    unit = tokens.double() / tokens.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit @ unit.T


def ranking(attention: torch.Tensor) -> list[int]:
    """An image's tokens by falling attention, the lowest index first among equals."""
    return sorted(range(len(attention)), key=lambda i: (-attention[i].item(), i))


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


# Rows with 4 entries of +-1 times a power of two: norms, cosines and their sums are exact in float32, so ties are ties.
exact_row = st.one_of(
    st.just([0.0] * 6),
    st.builds(
        lambda signs, gap, scale: [v * scale for v in [*signs[:gap], 0.0, 0.0, *signs[gap:]]],
        st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4),
        st.integers(0, 4),
        st.sampled_from([0.25, 1.0, 8.0]),
    ),
)
