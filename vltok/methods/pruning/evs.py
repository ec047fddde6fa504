"""EVS: keep what changes from frame to frame of a video.

Efficient Video Sampling, https://arxiv.org/abs/2510.14624. Training-free. Differs from the published code: a budget is
rounded as everywhere in vltok, and the first frame is kept whole also where a budget would not reach so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vltok.method import register
from vltok.methods.pruning.floors import select_stride
from vltok.methods.pruning.selector import Selector
from vltok.tokens import Grid3, keep_count
from vltok.visual import VisualTokens


def select_changes(tokens: torch.Tensor, num_frames: int, num_keep: int) -> torch.Tensor:
    """Pick the tokens that are least like the token at the same place one frame before, the first frame first.

    Args:
        tokens: Tokens of B videos, frame by frame, (B, T * P, D). Similarity is the cosine in float32.
        num_frames: Frames, T.
        num_keep: How many to keep, in 1..T * P.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; equal scores go to the lowest index.

    Raises:
        ValueError: If the tokens don't divide into frames, or `num_keep` is out of range.
    """
    batch, length, _ = tokens.shape
    if num_frames < 1 or length % num_frames:
        raise ValueError(f"{length} tokens are not {num_frames} frames of equal length")
    if not 1 <= num_keep <= length:
        raise ValueError(f"num_keep must be in 1..{length} (the visual tokens), got {num_keep}")
    frames = tokens.float().unflatten(1, (num_frames, -1))  # (B, T, P, D)
    change = 1 - torch.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1)
    first = change.new_full((batch, 1, frames.shape[2]), math.inf)
    scores = torch.cat([first, change], dim=1).flatten(1)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :num_keep].sort(dim=1).values


@dataclass(frozen=True)
class FrameSelector(Selector):
    """A selector that compares the frames of a video, and leaves images whole.

    It defines `of_frames` and `select_frames`. What stands behind the frames, such as a newline, always stays.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per != "image":
            raise ValueError(f'{type(self).__name__} compares the frames of a whole video; leave out per="{self.per}"')
        if self.regions is not None:
            raise ValueError(f"{type(self).__name__} compares whole frames of a video; leave out regions")

    def budget(self, num_tokens: int, grid: Grid3 | None, kind: Literal["image", "video"]) -> int:
        if kind == "image":
            return num_tokens
        if grid is None:
            raise ValueError(
                f"{type(self).__name__} compares frames, and this model doesn't show which visual tokens of a video "
                "are of which frame; use another method, such as StrideTokens"
            )
        behind = num_tokens - math.prod(grid)
        return behind + self.of_frames(keep_count(num_tokens, self.keep_ratio, self.num_keep) - behind, grid)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        if visual.grid is None:
            raise ValueError(f"{type(self).__name__} keeps some of the frames of a video; give `grid`, (T, H, W)")
        batch, length, _ = visual.embeddings.shape
        inside = math.prod(visual.grid)
        kept = self.select_frames(visual.embeddings[:, :inside], visual.grid, num_keep - (length - inside))
        behind = torch.arange(inside, length, device=kept.device).expand(batch, -1)
        return torch.cat([kept, behind], dim=1)

    def of_frames(self, wanted: int, grid: Grid3) -> int:
        """How many of the frames' tokens to keep where a budget pays for `wanted`, which may be below 1."""
        raise NotImplementedError

    def select_frames(self, tokens: torch.Tensor, grid: Grid3, num_keep: int) -> torch.Tensor:
        """Pick from the frames' tokens, (B, T * H * W, D): kept positions, (B, num_keep), ascending."""
        raise NotImplementedError


@register("evs")
@dataclass(frozen=True)
class EVS(FrameSelector):
    """Keep the visual tokens of a video that differ most from the frame before; the first frame stays whole.

    A later frame may lose all its tokens. Images are left whole.
    """

    def of_frames(self, wanted: int, grid: Grid3) -> int:
        return max(grid[1] * grid[2], wanted)

    def select_frames(self, tokens: torch.Tensor, grid: Grid3, num_keep: int) -> torch.Tensor:
        return select_changes(tokens, grid[0], num_keep)


@register("frames")
@dataclass(frozen=True)
class StrideFrames(FrameSelector):
    """Keep whole frames of a video at even distances, as many as the budget pays for, at least one: a floor.

    Images are left whole.
    """

    def of_frames(self, wanted: int, grid: Grid3) -> int:
        return max(1, wanted // (grid[1] * grid[2])) * grid[1] * grid[2]

    def select_frames(self, tokens: torch.Tensor, grid: Grid3, num_keep: int) -> torch.Tensor:
        size = grid[1] * grid[2]
        chosen = select_stride(grid[0], num_keep // size, tokens.device)
        kept = chosen.unsqueeze(1) * size + torch.arange(size, device=tokens.device)
        return kept.flatten().repeat(len(tokens), 1)
