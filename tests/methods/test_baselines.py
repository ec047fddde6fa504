"""The floors: random, stride and attention top-k, and how DivPrune stands among them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vltok.methods import DivPrune, FasterVLM, RandomTokens, StrideTokens
from vltok.methods.pruning.divprune import select_max_min
from vltok.methods.pruning.floors import position_hash, select_random, select_stride
from vltok.methods.pruning.ranking import select_top
from vltok.tokens import keep_count
from vltok.visual import AttentionRequest, VisualTokens

DATA = Path(__file__).parent.parent / "data"
KEYS = torch.tensor([0, 1, -5, 2**63 - 1, -(2**63), 0])


def visual(length: int = 24, attention: bool = True) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    return VisualTokens(
        embeddings=torch.randn(6, length, 8, generator=generator),
        image_keys=KEYS,
        attention=torch.rand(6, length, generator=generator) if attention else None,
        is_overview=torch.ones(6, length, dtype=torch.bool),
    )


@pytest.mark.parametrize("num_keep", [1, 5, 23, 24])
@pytest.mark.parametrize(
    "method",
    [DivPrune(keep_ratio=0.5), FasterVLM(keep_ratio=0.5), RandomTokens(keep_ratio=0.5), StrideTokens(keep_ratio=0.5)],
    ids=lambda method: method.name,
)
def test_every_selector_keeps_exactly_as_many_as_asked_ascending_and_row_by_row(method, num_keep):
    tokens = visual()
    kept = method.select(tokens, num_keep)
    assert kept.shape == (6, num_keep)
    assert kept.dtype == torch.int64
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < 24
    for i in range(6):
        own = {name: value[i : i + 1] for name, value in vars(tokens).items() if isinstance(value, torch.Tensor)}
        row = VisualTokens(**{"attention": None} | own)
        assert torch.equal(method.select(row, num_keep), kept[i : i + 1])


def test_divprune_selects_by_the_embeddings():
    tokens = visual()
    assert torch.equal(DivPrune(num_keep=5).select(tokens, 5), select_max_min(tokens.embeddings, 5))


def test_keep_counts_are_those_of_the_released_divprune():
    for length, ratio, kept in json.loads((DATA / "keep_counts.json").read_text()):
        if ratio > 0:
            assert keep_count(length, keep_ratio=ratio) == max(1, kept)


# Random


def split_mix(state: int) -> int:
    """The finaliser of SplitMix64 in Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, -3, 2**70 + 5])
def test_the_hash_is_split_mix_of_key_position_and_seed(seed):
    weyl = 0x9E3779B97F4A7C15
    for key, row in zip(KEYS.tolist(), position_hash(KEYS, 5, seed).tolist(), strict=True):
        stream = split_mix((key ^ (seed * weyl)) % 2**64)
        for position, value in enumerate(row, 1):
            assert value % 2**64 == split_mix((stream + position * weyl) % 2**64)


def test_random_picks_follow_key_and_seed_and_touch_no_generator():
    state = torch.get_rng_state()
    kept = select_random(KEYS, 100, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kept[0], kept[5])  # the same picture
    assert len({tuple(row) for row in kept.tolist()}) == 5
    assert not torch.equal(select_random(KEYS, 100, 10, seed=1), kept)
    assert torch.equal(RandomTokens(num_keep=10, seed=1).select(visual(100), 10), select_random(KEYS, 100, 10, seed=1))


def test_random_picks_are_uniform():
    kept = select_random(torch.arange(20_000), 16, 4)
    times = torch.bincount(kept.flatten(), minlength=16)
    assert (times - 5000).abs().max() < 5 * (20_000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    together = ((kept == 3).any(1) & (kept == 4).any(1)).sum().item()
    expected = 20_000 * (4 * 3) / (16 * 15)
    assert abs(together - expected) < 5 * expected**0.5


# Stride


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 3000), data=st.data())
def test_stride_rounds_even_steps_without_meeting_twice(length, data):
    num_keep = data.draw(st.integers(1, length))
    kept = select_stride(length, num_keep).tolist()
    assert kept == [round(Fraction(i * length, num_keep)) for i in range(num_keep)]
    assert len(set(kept)) == num_keep
    assert 0 <= min(kept) <= max(kept) < length


def test_stride_by_hand():
    assert select_stride(576, 4).tolist() == [0, 144, 288, 432]
    assert select_stride(10, 4).tolist() == [0, 2, 5, 8]
    assert select_stride(3, 2).tolist() == [0, 2]


# Attention


def test_fastervlm_keeps_the_highest_scores_ties_to_the_lowest_index():
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.9], [0.5, -torch.inf, 0.1, -torch.inf, 0.2]])
    assert select_top(scores, 2).tolist() == [[1, 2], [0, 4]]
    assert select_top(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 4]]
    tokens = visual()
    assert torch.equal(FasterVLM(num_keep=6).select(tokens, 6), select_top(tokens.attention, 6))


@pytest.mark.parametrize(
    ("score", "has_cls", "kind"),
    [("auto", True, "cls"), ("auto", False, "received"), ("received", True, "received"), ("cls", True, "cls")],
)
def test_fastervlm_asks_for_the_last_layer_but_one(score, has_cls, kind):
    assert FasterVLM(keep_ratio=0.1, score=score).attention_request(has_cls) == AttentionRequest(kind, -2)


# Bad input


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"num_keep must be in 1\.\.5 .* got 6"):
        select_top(torch.rand(2, 5), 6)
    with pytest.raises(ValueError, match="NaN"):
        select_top(torch.tensor([[0.1, torch.nan]]), 1)
    with pytest.raises(ValueError, match="give `attention`"):
        FasterVLM(keep_ratio=0.1).select(visual(attention=False), 2)
    with pytest.raises(ValueError, match="score must be one of 'auto', 'cls', 'received', got 'CLS'"):
        FasterVLM(keep_ratio=0.1, score="CLS")
    for select in (select_stride, lambda length, num_keep: select_random(KEYS, length, num_keep)):
        for num_keep in (0, 6):
            with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.5 .* got {num_keep}"):
                select(5, num_keep)
    with pytest.raises(TypeError, match="seed must be an integer, got '1'"):
        RandomTokens(keep_ratio=0.1, seed="1")
