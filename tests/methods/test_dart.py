"""DART: against the released picks, a naive twin, ties, and budgets that don't divide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import made_up

from vltok.methods.pruning import dart
from vltok.methods.pruning.dart import DART, choose_pivots, dart_order

DATA = Path(__file__).parents[1] / "data"
# Where the image starts and how long it is, pivots of the image and of the text, and how many of the picks another
# order of the pivots shares: the ascending one.
GOLDEN = {
    "dart_l640_n576_k128": (35, 576, 4, 4, 122),
    "dart_l31_n20_k8_small": (4, 20, 2, 2, 10),
    "dart_embed_l160_n128_ratio": (12, 128, 4, 4, 32),
}


def golden(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    stored = load_file(DATA / f"{name}.safetensors")
    start, length, *_ = GOLDEN[name]
    state = stored["in.state"][0]
    keys = stored["in.keys"][0].transpose(0, 1).flatten(1) if "in.keys" in stored else state
    index = torch.arange(len(state))
    return stored, state, keys, (index >= start) & (index < start + length), index >= start + length


def naive_order(state: torch.Tensor, pivots: list[int], visual: list[int], num_keep: int) -> list[int]:
    """Token by token: the pivots of the picture, then for each pivot the least similar ones that are left."""
    state = state.double()
    kept = [pivot for pivot in pivots if pivot in visual]
    rest = num_keep - len(kept)
    for turn, pivot in enumerate(pivots):
        count = rest // len(pivots) + (turn < rest % len(pivots))
        likeness = {i: (state[i] @ state[pivot] / state[i].norm().clamp_min(1e-12)).item() for i in visual}
        left = [i for i in visual if i not in kept]
        kept += sorted(left, key=lambda i, likeness=likeness: (likeness[i], i))[:count]
    return kept


@pytest.mark.parametrize("name", GOLDEN)
def test_picks_are_the_released_ones_in_the_released_order_of_pivots(name):
    stored, state, keys, is_visual, is_text = golden(name)
    _, _, of_image, of_text, shared = GOLDEN[name]
    pivots = choose_pivots(keys, is_visual, is_text, of_image, of_text)
    assert torch.equal(pivots, stored["mid.pivot_order"].sort().values)
    assert torch.equal(pivots[is_visual[pivots]], stored["mid.pivots_image"].sort().values)
    num_keep = len(stored["out.kept"])
    released = dart_order(state, stored["mid.pivot_order"], is_visual, num_keep)
    assert torch.equal(released.sort().values, stored["out.kept"])
    ascending = dart_order(state, pivots, is_visual, num_keep)
    assert torch.isin(ascending, stored["out.kept"]).sum() == shared


@pytest.mark.parametrize("fault", ["pivots by state", "not normalised", "bfloat16 products"])
def test_planted_faults_miss_the_released_picks(fault, monkeypatch):
    stored, state, _, is_visual, is_text = golden("dart_l640_n576_k128")
    pivots = stored["mid.pivot_order"]
    if fault == "pivots by state":
        pivots = choose_pivots(state, is_visual, is_text)
    if fault == "not normalised":
        monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, dim: torch.ones(len(x)))
    if fault == "bfloat16 products":
        monkeypatch.setattr(dart, "times_row", lambda x, column, out: out.copy_(x.bfloat16() @ column.bfloat16()))
    picks = dart_order(state, pivots, is_visual, 132)
    assert not torch.equal(picks.sort().values, stored["out.kept"])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_picks_are_those_of_the_naive_twin(data):
    length = data.draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    if data.draw(st.booleans()):  # products and norms are exact, so that ties are ties
        state = torch.eye(8)[torch.randint(8, (length,), generator=generator)]
        state = state * 2.0 ** torch.randint(-1, 2, (length, 1), generator=generator)
    else:
        state = torch.randn(length, 8, generator=generator)
    is_visual = torch.rand(length, generator=generator) < 0.7
    is_visual[data.draw(st.integers(0, length - 1))] = True
    pivots = torch.randperm(length, generator=generator)[: data.draw(st.integers(1, min(length, 8)))]
    visual = is_visual.nonzero().squeeze(1).tolist()
    fewest = max(1, int(is_visual[pivots].sum()))
    num_keep = data.draw(st.integers(fewest, len(visual)))
    picks = dart_order(state, pivots, is_visual, num_keep)
    assert picks.tolist() == naive_order(state, pivots.tolist(), visual, num_keep)
    assert len(set(picks.tolist())) == num_keep


def test_pivots_have_the_largest_l1_norms_ties_to_the_lowest_index():
    keys = torch.tensor([[1.0, -1], [0, 3], [2, 0], [-2, 0], [9, 9], [-1, 1], [0, 5]])
    is_visual = torch.tensor([1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    is_text = torch.tensor([0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert choose_pivots(keys, is_visual, is_text, 3, 1).tolist() == [0, 1, 2, 6]
    assert choose_pivots(keys, is_visual, is_text, 1, 4).tolist() == [1, 5, 6]
    assert choose_pivots(keys, is_visual, is_text, 9, 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_keep", [1, 3, 4, 5, 11, 12, 13, 23, 24])
def test_the_selector_meets_every_budget_and_keeps_the_heaviest_tokens(num_keep):
    visual = made_up()
    kept = DART(num_keep=num_keep).select(visual, num_keep)
    for x, text, mask, row in zip(visual.embeddings, visual.text, visual.text_mask, kept.tolist(), strict=True):
        heavy = x.abs().sum(1).argsort(descending=True)[: min(4, num_keep)].tolist()
        words = text[mask]
        chosen = sorted(words.abs().sum(1).argsort(descending=True)[:4].tolist())
        state, pivots = torch.cat([x, words]), sorted(heavy) + [24 + i for i in chosen]
        assert row == sorted(naive_order(state, pivots, list(range(24)), num_keep))
        assert set(heavy) <= set(row)


def test_words_give_pivots_where_there_are_some():
    visual = made_up()
    assert DART(num_keep=12).needs == ("text",)
    assert DART(num_keep=12, text_pivots=0).needs == ()
    without = DART(num_keep=12, text_pivots=0).select(replace(visual, text=None, text_mask=None), 12)
    assert not torch.equal(DART(num_keep=12).select(visual, 12), without)
    wordless = replace(visual, text_mask=torch.zeros_like(visual.text_mask))
    assert torch.equal(DART(num_keep=12).select(wordless, 12), without)


def test_bad_input_says_what_is_allowed():
    state, is_visual = torch.randn(6, 3), torch.arange(6) < 5
    for num_keep in (1, 6):
        with pytest.raises(ValueError, match=rf"num_keep must be in 2\.\.5 .* got {num_keep}"):
            dart_order(state, torch.tensor([0, 1, 5]), is_visual, num_keep)
    with pytest.raises(ValueError, match="with at least one pivot, got 3 with 0"):
        dart_order(state, torch.tensor([], dtype=torch.int64), is_visual, 3)
    for token, value in ((0, torch.nan), (5, torch.inf), (3, 1e20)):
        broken = state.clone()
        broken[token, 1] = value
        with pytest.raises(ValueError, match="states of visual tokens or pivots hold NaN"):
            dart_order(broken, torch.tensor([5, 2]), is_visual, 3)
    with pytest.raises(ValueError, match=r"give `text`, \(B, M, D\)"):
        DART(num_keep=5).select(replace(made_up(), text=None), 5)
    with pytest.raises(ValueError, match="visual_pivots must be at least 1, got 0"):
        DART(num_keep=5, visual_pivots=0)
    with pytest.raises(TypeError, match=r"text_pivots must be an integer of at least 0, got 1\.5"):
        DART(num_keep=5, text_pivots=1.5)
