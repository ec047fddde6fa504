"""EVS and whole frames: against published picks, a naive twin, and at the ends of what a budget may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import vltok
from vltok.methods.pruning.evs import select_changes
from vltok.visual import VisualTokens

DATA = Path(__file__).parents[1] / "data"


def visual(tokens: torch.Tensor, grid: tuple[int, int, int] | None) -> VisualTokens:
    """A video's tokens, (B, N, D), as a selector gets them."""
    batch, length, _ = tokens.shape
    keys = torch.zeros(batch, dtype=torch.int64)
    return VisualTokens(tokens, keys, None, torch.ones(batch, length, dtype=torch.bool), grid)


def naive(tokens: torch.Tensor, frames: int, keep: int) -> list[int]:
    """Place by place: the first frame, then what is least like the same place one frame before."""
    size = len(tokens) // frames
    change = []
    for place, token in enumerate(tokens.double()):
        before = tokens[place - size].double()
        likeness = (token @ before / token.norm() / before.norm()).item() if place >= size else -10
        change.append((likeness, place))
    return sorted(place for _, place in sorted(change)[:keep])


@pytest.mark.parametrize(("name", "frames"), [("evs_t8_p64", 8), ("evs_ties", 6)])
def test_picks_are_the_published_ones(name, frames):
    golden = load_file(DATA / f"{name}.safetensors")
    tokens = golden["in.x"].float()
    for key in (key for key in golden if key.startswith("out.mask")):
        expected = golden[key].nonzero().squeeze(1)
        assert torch.equal(select_changes(tokens[None], frames, len(expected))[0], expected), key


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_picks_are_those_of_the_naive_twin(data):
    frames, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    keep = data.draw(st.integers(1, frames * size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    tokens = torch.randn(2, frames * size, 4, generator=generator)
    picks = select_changes(tokens, frames, keep)
    assert picks.tolist() == [naive(each, frames, keep) for each in tokens]


def test_equal_frames_go_to_the_lowest_index():
    tokens = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1)  # four equal frames
    assert select_changes(tokens, 4, 5)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 24), (0.5, 12), (0.3, 7), (0.01, 6)])
def test_the_first_frame_is_whole_whatever_the_budget(ratio, kept):
    method = vltok.EVS(keep_ratio=ratio)
    assert method.budget(24, (4, 2, 3), "video") == kept
    picks = method.select(visual(torch.randn(2, 24, 8), (4, 2, 3)), kept)
    assert picks.shape == (2, kept) and (picks[:, :6] == torch.arange(6)).all()


@pytest.mark.parametrize("method", [vltok.EVS(num_keep=10), vltok.StrideFrames(num_keep=10)], ids=lambda m: m.name)
def test_tokens_behind_the_frames_stay(method):
    tokens = torch.randn(1, 25, 8)
    count = method.budget(25, (4, 2, 3), "video")
    picks = method.select(visual(tokens, (4, 2, 3)), count)
    assert len(set(picks[0].tolist())) == count and picks[0, -1] == 24 and (picks.diff() > 0).all()


@pytest.mark.parametrize(("ratio", "frames"), [(1.0, [0, 1, 2, 3]), (0.5, [0, 2]), (0.4, [0]), (0.01, [0])])
def test_whole_frames_at_even_distances(ratio, frames):
    method = vltok.StrideFrames(keep_ratio=ratio)
    count = method.budget(24, (4, 2, 3), "video")
    picks = method.select(visual(torch.randn(1, 24, 8), (4, 2, 3)), count)
    assert picks[0].tolist() == [frame * 6 + place for frame in frames for place in range(6)]


@pytest.mark.parametrize("method", [vltok.EVS, vltok.StrideFrames])
def test_images_are_left_whole_and_a_video_without_frames_is_refused(method):
    assert method(keep_ratio=0.1).budget(17, None, "image") == 17
    with pytest.raises(ValueError, match="doesn't show which visual tokens of a video are of which frame"):
        method(keep_ratio=0.1).budget(17, None, "video")
    with pytest.raises(ValueError, match='leave out per="frame"'):
        method(keep_ratio=0.1, per="frame")
    with pytest.raises(ValueError, match="compares whole frames of a video; leave out regions"):
        method(keep_ratio=0.1, regions=(2, 2))
    with pytest.raises(ValueError, match="give `grid`"):
        method(keep_ratio=0.5).select(visual(torch.randn(1, 4, 4), None), 2)


@pytest.mark.parametrize(
    ("frames", "keep", "message"), [(3, 2, "not 3 frames"), (2, 0, "num_keep"), (2, 9, "num_keep")]
)
def test_what_does_not_divide_is_refused(frames, keep, message):
    with pytest.raises(ValueError, match=message):
        select_changes(torch.randn(1, 8, 4), frames, keep)
