"""SCOPE: against published picks, the plain greedy algorithm, and at ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import cosines, exact_row, tower_tokens

from vltok.methods.pruning import covering, greedy
from vltok.methods.pruning.scope import SCOPE, cover_order

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(params=[1, 5, 32])
def at_a_time(request, monkeypatch):
    """How many gains are computed in one go, which must change nothing."""
    monkeypatch.setattr(covering, "_AT_A_TIME", request.param)


def gains(cosine: torch.Tensor, picked: list[int], weights: torch.Tensor) -> torch.Tensor:
    """What each token would add, by the definition, float64."""
    cover = cosine[picked].clamp_min(0).amax(0) if picked else torch.zeros(len(cosine), dtype=cosine.dtype)
    return (cosine - cover).clamp_min(0).sum(1) * weights


def slow_order(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor) -> list[int]:
    cosine, picked = cosines(tokens), []
    while len(picked) < num_keep:
        gain = gains(cosine, picked, weights.double()).tolist()
        picked.append(max((i for i in range(len(gain)) if i not in picked), key=lambda i: (gain[i], -i)))
    return picked


def plain_order(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor) -> list[int]:
    """The greedy algorithm that computes every gain each time, float32."""
    cosine = greedy.cosine_matrix(tokens.unsqueeze(0))[0]
    cover, picked = torch.zeros(len(cosine)), []
    for _ in range(num_keep):
        gain = (cosine - cover).clamp_min(0).sum(1) * weights
        gain[picked] = -torch.inf
        picked.append(gain.argmax().item())
        cover = torch.maximum(cover, cosine[picked[-1]])
    return picked


@pytest.mark.parametrize(
    ("name", "num_keep"), [("scope_b2_n49_d16_k12", 12), ("scope_n576_d64_k64", 64), ("scope_n576_d256_k128", 128)]
)
def test_picks_are_the_published_ones_in_order(name, num_keep, at_a_time):
    golden = load_file(DATA / f"{name}.safetensors")
    attention = golden["in.cls_attn_sum"]
    weights = {"att": attention, "att_half": attention**0.5, "noatt": torch.ones_like(attention)}
    for tag in weights.keys() & {key.removeprefix("out.order.") for key in golden}:
        order = cover_order(golden["in.x"], num_keep, weights[tag])
        assert torch.equal(order, golden[f"out.order.{tag}"]), tag


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("length", "width"), [(7, 3), (60, 24), (577, 32)])
def test_picks_are_those_of_computing_every_gain_each_time(length, width, weighted, at_a_time):
    visual = tower_tokens(batch=2, length=length, width=width * 4)
    weights = visual.attention if weighted else torch.ones_like(visual.attention)
    num_keep = min(length, 80)
    order = cover_order(visual.features, num_keep, weights)
    assert torch.equal(cover_order(visual.features, 5, weights), order[:, :5])
    for x, weight, picks in zip(visual.features, weights, order.tolist(), strict=True):
        assert picks == plain_order(x, num_keep, weight)
        cosine = cosines(x)
        for step, pick in enumerate(picks):  # each is the best one left, up to float32
            gain = gains(cosine, picks[:step], weight.double())
            gain[picks[:step]] = -1
            assert gain[pick] >= gain.max() - 1e-6 * length * weight.max()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(exact_row, st.sampled_from([0.0, 0.125, 0.5, 1.0])), min_size=1, max_size=40),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    count=st.sampled_from([1, 3, 32]),
)
def test_ties_duplicates_and_zero_rows_follow_the_definition_exactly(rows, data, dtype, count):
    tokens = torch.tensor([row for row, _ in rows], dtype=dtype)
    weights = torch.tensor([weight for _, weight in rows])
    num_keep = data.draw(st.integers(1, len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covering, "_AT_A_TIME", count)
        order = cover_order(tokens[None], num_keep, weights[None])
    assert order.dtype == torch.int64
    assert order[0].tolist() == slow_order(tokens, num_keep, weights)


@pytest.mark.parametrize(("length", "width"), [(9, 64), (50, 33), (577, 1000), (800, 256)])
def test_equal_tokens_tie_exactly_whatever_their_position(length, width):
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(4, width, generator=generator)
    kind = torch.randint(4, (length,), generator=generator)
    picks = cover_order(kinds[kind].unsqueeze(0), 8, torch.ones(1, length))[0].tolist()
    assert len(set(kind[picks[:4]].tolist())) == 4  # one of each kind covers everything
    for step, pick in enumerate(picks[:4]):
        assert pick == min(i for i in range(length) if kind[i] == kind[pick] and i not in picks[:step])


def test_images_go_at_their_own_pace_and_in_parts(monkeypatch):
    visual = tower_tokens(batch=5, length=100)
    order = cover_order(visual.features, 40, visual.attention)
    for image in range(5):
        own = slice(image, image + 1)
        assert torch.equal(cover_order(visual.features[own], 40, visual.attention[own]), order[own])
    monkeypatch.setattr(greedy, "GRAM_ENTRIES", 2 * 100**2)
    assert torch.equal(cover_order(visual.features, 40, visual.attention), order)


def test_alpha_is_the_exponent_of_attention():
    visual = tower_tokens()
    for alpha in (0.0, 0.5, 1.0, 3.0):
        expected = cover_order(visual.features, 12, visual.attention**alpha).sort(1).values
        assert torch.equal(SCOPE(num_keep=12, alpha=alpha).select(visual, 12), expected)
    top = visual.attention.argsort(dim=1, descending=True)[:, :12].sort(1).values
    coverage, attended = (SCOPE(num_keep=12, alpha=alpha).select(visual, 12) for alpha in (0.0, 9.0))
    assert (torch.isin(attended, top)).sum() > (torch.isin(coverage, top)).sum()


def test_weights_of_minus_infinity_come_after_those_of_zero():
    tokens = torch.eye(5).repeat(1, 1, 1)
    weights = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, 0.0]])
    assert cover_order(tokens, 5, weights).tolist() == [[2, 1, 4, 0, 3]]


@pytest.mark.parametrize("value", [-0.1, torch.nan, torch.inf])
def test_weights_that_are_none_are_refused(value):
    weights = torch.ones(2, 5)
    weights[1, 3] = value
    with pytest.raises(ValueError, match="weights of visual tokens must be numbers of at least 0"):
        cover_order(torch.ones(2, 5, 3), 2, weights)
