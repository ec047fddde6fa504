"""VidCom2: keep what stands out in a video and in its frame, more of the frames that stand out themselves.

Video Compression Commander, https://arxiv.org/abs/2505.14454. Training-free. Follows the form published in vLLM.
Differs from it: a budget is rounded as everywhere in vltok, and is met also where it is below a token per frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vltok.method import register
from vltok.methods.pruning.evs import FrameSelector
from vltok.methods.pruning.greedy import check_usable
from vltok.tokens import Grid3

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the Gaussian kernels that are added up to a similarity
TEMPERATURE = 0.01  # of the softmax over frames


def select_standing_out(tokens: torch.Tensor, num_frames: int, num_keep: int) -> torch.Tensor:
    """Pick the tokens that are least like the mean of their video and of their frame.

    Compared are the half of the channels that vary least, at unit length. Frames that are less like the video get up to
    twice the share of tokens that the others get; where their rounded counts miss `num_keep`, the tokens that are most
    like the means leave, or those that are least like them come in.

    Args:
        tokens: Tokens of B videos, frame by frame, (B, T * P, D), any float dtype; computed in float32.
        num_frames: Frames, T.
        num_keep: How many to keep, in 1..T * P.

    Returns:
        Kept positions, (B, num_keep), ascending, int64; equal similarities go to the lowest index.

    Raises:
        ValueError: If the tokens don't divide into frames, `num_keep` is out of range, or an embedding is NaN or
            infinite.
    """
    length = tokens.shape[1]
    if num_frames < 1 or length % num_frames:
        raise ValueError(f"{length} tokens are not {num_frames} frames of equal length")
    if not 1 <= num_keep <= length:
        raise ValueError(f"num_keep must be in 1..{length} (the visual tokens), got {num_keep}")
    check_usable(tokens)
    kept = torch.empty(len(tokens), num_keep, dtype=torch.int64, device=tokens.device)
    for row, x in zip(kept, tokens.detach(), strict=True):  # so that a video doesn't depend on the batch
        row.copy_(_of_video(x.float(), num_frames, num_keep))
    return kept


def _of_video(x: torch.Tensor, num_frames: int, num_keep: int) -> torch.Tensor:
    steady = x.var(0, correction=0).argsort(stable=True)[: max(1, x.shape[1] // 2)].sort().values
    x = torch.nn.functional.normalize(x[:, steady], dim=1).unflatten(0, (num_frames, -1))  # (T, P, C)
    to_video = _similarity(x, x.mean((0, 1), keepdim=True))  # (T, P)
    similarity = to_video + _similarity(x, x.mean(1, keepdim=True))
    weight = (-to_video.mean(1) / TEMPERATURE).softmax(0)  # of each frame, (T,)
    size = x.shape[1]
    share = num_keep / (num_frames * size)
    counts = (size * share * (1 + weight - weight.mean())).round().clamp(1, size)
    chosen = similarity.argsort(dim=1, stable=True).argsort(dim=1) < counts.unsqueeze(1)
    # What the frames' counts choose goes first, and within it, as in the rest, what is least similar.
    order = similarity.flatten().argsort(stable=True)
    order = order[(~chosen.flatten()[order]).to(torch.uint8).argsort(stable=True)]
    return order[:num_keep].sort().values


def _similarity(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    squared = (x - mean).square().sum(-1)
    return sum(torch.exp(squared / (-2 * width)) for width in WIDTHS)


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(FrameSelector):
    """Keep the visual tokens of a video that stand out in it and in their frame, more of frames that stand out.

    A frame may lose all its tokens. Images are left whole.
    """

    def of_frames(self, wanted: int, grid: Grid3) -> int:
        return max(1, wanted)

    def select_frames(self, tokens: torch.Tensor, grid: Grid3, num_keep: int) -> torch.Tensor:
        return select_standing_out(tokens, grid[0], num_keep)
