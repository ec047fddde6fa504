"""HoloV: against published shares and picks, and that no part of a budget is lost."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import ranking, tower_tokens

from vltok.methods.pruning.holov import HoloV, select_by_strips, share_budget

DATA = Path(__file__).parents[1] / "data"
GOLDEN = {
    "holov_n50_c7_k12_uneven": (7, 12),
    "holov_n576_c16_k64": (16, 64),
    "holov_n96_c16_k32_overflow_zero_rows": (16, 32),
}


def strips(length: int, count: int) -> list[range]:
    """Runs of places, the first ones one longer where it doesn't divide."""
    ends = [length // count * i + min(i, length % count) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", GOLDEN)
def test_shares_and_picks_are_the_published_ones(name):
    golden = load_file(DATA / f"{name}.safetensors")
    count, num_keep = GOLDEN[name]
    attention = golden["in.attention"][0]
    parts = strips(len(attention), count)
    quota = share_budget([attention[list(part)].mean().item() for part in parts], num_keep)
    assert quota == golden["mid.quota"].tolist()
    released = []  # in its order: whole strips in raster order, else by falling attention; what has no room is lost
    for part, share in zip(parts, quota, strict=True):
        order = [part[i] for i in ranking(attention[list(part)])]
        released += list(part) if share >= len(part) else order[:share]
    positions = golden["out.positions"].tolist()
    assert released + [-1] * (num_keep - len(released)) == positions
    kept = select_by_strips(attention[None], num_keep, count)[0].tolist()
    assert kept == sorted(set(kept)) and len(kept) == num_keep
    assert set(kept) >= set(released)
    if -1 not in positions:
        assert kept == sorted(positions)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.25, 1.0, 7.0]), st.integers(0, 9)), min_size=1, max_size=9),
    data=st.data(),
)
def test_a_budget_is_shared_to_the_last_token_within_what_there_is(parts, data):
    scores, sizes = [score for score, _ in parts], [size for _, size in parts]
    num_keep = data.draw(st.integers(0, sum(sizes)))
    quota = share_budget(scores, num_keep, sizes)
    assert sum(quota) == num_keep
    assert all(0 <= share <= size for share, size in zip(quota, sizes, strict=True))
    for i, score in enumerate(scores):  # who has more attention has no less, unless there is no more to have
        for j, other in enumerate(scores):
            assert not score > other or quota[i] >= quota[j] or quota[i] == sizes[i]


@settings(max_examples=200, deadline=None)
@given(scores=st.lists(st.integers(1, 64), min_size=1, max_size=9), num_keep=st.integers(0, 200))
def test_without_ends_shares_are_rounded_down_and_the_rest_goes_to_the_highest(scores, num_keep):
    exact = [Fraction(score * num_keep, sum(scores)) for score in scores]
    expected = [int(share) for share in exact]
    missing = num_keep - sum(expected)
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:missing]:
        expected[i] += 1
    near = any(share.denominator == 1 and share > 0 for share in exact)  # whose float may fall short by a rounding
    got = share_budget([float(score) for score in scores], num_keep)
    assert got == expected or (near and sum(got) == num_keep)


def test_shares_by_hand():
    assert share_budget([0.5, 0.25, 0.25], 9) == [5, 2, 2]
    assert share_budget([0.5, 0.25, 0.25], 9, [3, 9, 9]) == [3, 3, 3]
    assert share_budget([0.0, 0.0], 3, [2, 2]) == [2, 1]
    assert share_budget([1.0, 0.0], 3, [2, 2]) == [2, 1]
    assert share_budget([0.0, 1.0], 1) == [0, 1]
    with pytest.raises(ValueError, match=r"parts of \[2, 2\] tokens have no room for num_keep=5"):
        share_budget([0.5, 0.5], 5, [2, 2])


@pytest.mark.parametrize("crops", [1, 7, 60, 99])
def test_the_most_attended_of_each_strip_are_kept(crops):
    visual = tower_tokens()
    kept = HoloV(num_keep=20, crops=crops).select(visual, 20)
    parts = strips(60, min(crops, 60))
    for attention, own in zip(visual.attention, kept.tolist(), strict=True):
        means = [attention[list(part)].double().mean().item() for part in parts]
        quota = share_budget(means, 20, [len(part) for part in parts])
        ranked = [[part[i] for i in ranking(attention[list(part)])] for part in parts]
        assert own == sorted(i for order, share in zip(ranked, quota, strict=True) for i in order[:share])


@pytest.mark.parametrize(("num_keep", "strips"), [(1, 1), (7, 1), (8, 2), (33, 8), (64, 16), (192, 16)])
def test_strips_are_one_for_four_kept_tokens_and_sixteen_at_most(num_keep, strips):
    visual = tower_tokens(length=300)
    kept = HoloV(num_keep=num_keep).select(visual, num_keep)
    assert torch.equal(kept, select_by_strips(visual.attention, num_keep, strips))
