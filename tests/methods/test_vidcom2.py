"""VidCom2: against the published picks, a naive twin, and at the ends of what a budget may be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from visual import made_up

from vltok.methods.pruning import vidcom2
from vltok.methods.pruning.vidcom2 import VidCom2, select_standing_out

DATA = Path(__file__).parents[1] / "data"


def naive(tokens: torch.Tensor, frames: int, keep: int) -> list[int] | None:
    """Token by token, float64; none where a frame's count is too close to a half to be told."""
    tokens = tokens.double()
    size = len(tokens) // frames
    variance = ((tokens - tokens.mean(0)) ** 2).mean(0).tolist()
    channels = sorted(range(len(variance)), key=lambda c: (variance[c], c))[: max(1, len(variance) // 2)]
    x = [token[channels] / token[channels].norm().clamp_min(1e-12) for token in tokens]
    video = sum(x) / len(x)
    frame = [sum(x[t * size : (t + 1) * size]) / size for t in range(frames)]

    def near(token: torch.Tensor, mean: torch.Tensor) -> float:
        return sum(math.exp(-((token - mean) ** 2).sum().item() / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    to_video = [near(token, video) for token in x]
    likeness = [to_video[i] + near(x[i], frame[i // size]) for i in range(len(x))]
    scores = [-sum(to_video[t * size : (t + 1) * size]) / size / 0.01 for t in range(frames)]
    powers = [math.exp(score - max(scores)) for score in scores]
    weights = [power / sum(powers) for power in powers]
    chosen: list[int] = []
    for t in range(frames):
        scale = min(1, keep / len(x) * (1 + weights[t] - sum(weights) / frames))
        if scale < 1 and abs(size * scale % 1 - 0.5) < 1e-4:
            return None
        count = min(size, max(1, round(size * scale)))
        chosen += sorted(range(t * size, (t + 1) * size), key=lambda i: (likeness[i], i))[:count]
    chosen.sort(key=lambda i: (likeness[i], i))
    rest = sorted(set(range(len(x))) - set(chosen), key=lambda i: (likeness[i], i))
    return sorted((chosen + rest)[:keep])


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9])
def test_picks_are_the_published_ones(rate):
    stored = load_file(DATA / "vidcom2_t8_p64.safetensors")
    expected = stored[f"out.mask.q{rate}"].nonzero().squeeze(1)
    assert torch.equal(select_standing_out(stored["in.x"].unsqueeze(0), 8, len(expected))[0], expected)


@pytest.mark.parametrize("fault", ["all channels", "one width", "even frames", "not normalised"])
def test_planted_faults_miss_the_published_picks(fault, monkeypatch):
    stored = load_file(DATA / "vidcom2_t8_p64.safetensors")
    expected = stored["out.mask.q0.75"].nonzero().squeeze(1)
    tokens = stored["in.x"].float().unsqueeze(0)
    if fault == "all channels":  # the others are made to vary most
        noise = 100 * torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(0))
        tokens = torch.cat([tokens, noise], dim=2)
    if fault == "one width":
        monkeypatch.setattr(vidcom2, "WIDTHS", (1,))
    if fault == "even frames":
        monkeypatch.setattr(vidcom2, "TEMPERATURE", 1e6)
    if fault == "not normalised":
        monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, dim: x)
    assert not torch.equal(select_standing_out(tokens, 8, len(expected))[0], expected)


@pytest.mark.parametrize(("frames", "size"), [(1, 3), (2, 7), (5, 3), (4, 9), (9, 4)])  # of two, none stands out
@pytest.mark.parametrize("apart", [0.05, 1.0])
def test_picks_are_those_of_the_naive_twin(frames, size, apart):
    generator = torch.Generator().manual_seed(frames)
    frame = apart * torch.randn(2, frames, 1, 6, generator=generator)
    tokens = (frame + 0.5 * torch.randn(2, frames, size, 6, generator=generator)).flatten(1, 2)
    told = 0
    for keep in range(1, frames * size + 1):
        for x, picks in zip(tokens, select_standing_out(tokens, frames, keep).tolist(), strict=True):
            expected = naive(x, frames, keep)
            told += expected is not None
            assert expected in (picks, None)
    assert told > frames * size


def test_a_frame_unlike_the_others_gets_more():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, generator=generator) + 0.3 * torch.randn(4, 10, 8, generator=generator)
    tokens[2] += 3 * torch.randn(8, generator=generator)
    picks = select_standing_out(tokens.flatten(0, 1).unsqueeze(0), 4, 12)[0]
    counts = torch.bincount(picks // 10, minlength=4).tolist()
    assert sum(counts) == 12
    assert counts[2] > max(counts[0], counts[1], counts[3])


def test_equal_frames_share_evenly_the_lowest_index_first():
    tokens = torch.ones(1, 12, 4)
    assert select_standing_out(tokens, 3, 6)[0].tolist() == [0, 1, 4, 5, 8, 9]
    assert select_standing_out(tokens, 3, 2)[0].tolist() == [0, 4]  # fewer than frames
    assert select_standing_out(tokens, 3, 7)[0].tolist() == [0, 1, 2, 4, 5, 8, 9]


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 24), (0.5, 12), (0.3, 7), (0.05, 1), (0.01, 1)])
def test_the_total_is_what_the_budget_says(ratio, kept):
    method = VidCom2(keep_ratio=ratio)
    assert method.budget(24, (4, 2, 3), "video") == kept
    assert method.select(made_up(2, 24, frames=4), kept).shape == (2, kept)


@pytest.mark.parametrize(("num_keep", "count"), [(10, 10), (1, 2)])
def test_tokens_behind_the_frames_stay(num_keep, count):
    method = VidCom2(num_keep=num_keep)
    assert method.budget(25, (4, 2, 3), "video") == count
    picks = method.select(replace(made_up(1, 25), grid=(4, 2, 3)), count)
    assert len(set(picks[0].tolist())) == count
    assert picks[0, -1] == 24
    assert (picks.diff() > 0).all()


def test_images_are_left_whole_and_a_video_without_frames_is_refused():
    assert VidCom2(keep_ratio=0.1).budget(17, None, "image") == 17
    with pytest.raises(ValueError, match="doesn't show which visual tokens of a video are of which frame"):
        VidCom2(keep_ratio=0.1).budget(17, None, "video")
    with pytest.raises(ValueError, match='leave out per="frame"'):
        VidCom2(keep_ratio=0.1, per="frame")
    with pytest.raises(ValueError, match="give `grid`"):
        VidCom2(keep_ratio=0.5).select(replace(made_up(), grid=None), 2)


@pytest.mark.parametrize(
    ("frames", "keep", "message"), [(3, 2, "not 3 frames"), (2, 0, "num_keep"), (2, 9, "num_keep")]
)
def test_what_does_not_divide_is_refused(frames, keep, message):
    with pytest.raises(ValueError, match=message):
        select_standing_out(torch.randn(1, 8, 4), frames, keep)


def test_an_empty_batch_is_fine():
    assert select_standing_out(torch.ones(0, 6, 3), 2, 2).shape == (0, 2)
