"""MMTok: against the released picks, a naive twin, and ties."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import made_up, repeated

from vltok.methods.pruning.mmtok import MMTok, cover_order, coverage

DATA = Path(__file__).parents[1] / "data"
GOLDEN = ["mmtok_n576_m9_k64", "mmtok_n40_m5_k10_exclude"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stored = load_file(DATA / f"{name}.safetensors")
    excluded = torch.zeros(len(stored["in.x"]), dtype=torch.bool)
    excluded[stored["in.exclude"]] = True
    return stored, excluded


def naive_coverage(tokens: torch.Tensor, features: torch.Tensor, words: torch.Tensor, knobs: tuple) -> torch.Tensor:
    """W = [P; alpha Q] by its rows, float64: each word's softmax over the tokens, then each token's."""
    alpha, word_temperature, image_temperature = knobs

    def row(queries: torch.Tensor, query: int, keys: torch.Tensor, temperature: float) -> torch.Tensor:
        def length(x: torch.Tensor) -> float:
            return max(x.norm().item(), 1e-8)

        near = [(queries[query] @ key / length(queries[query]) / length(key)).item() for key in keys]
        powers = [math.exp(cosine / temperature) for cosine in near]
        return torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)

    tokens, features, words = tokens.double(), features.double(), words.double()
    of_words = [row(words, m, tokens, word_temperature) / len(words) for m in range(len(words))]
    of_tokens = [alpha * row(features, n, features, image_temperature) / len(tokens) for n in range(len(tokens))]
    return torch.stack(of_words + of_tokens)


def naive_order(covers: torch.Tensor, num_keep: int, excluded: torch.Tensor) -> list[int]:
    """Look at every candidate at every step; (N, R)."""
    picks: list[int] = []
    while len(picks) < num_keep:
        covered = covers[picks].amax(0) if picks else torch.zeros(covers.shape[1])
        adds = (covers - covered).clamp(min=0).sum(1).tolist()
        left = [i for i in range(len(covers)) if i not in picks and not excluded[i]]
        picks.append(max(left, key=lambda i: (adds[i], -i)))
    return picks


@pytest.mark.parametrize("name", GOLDEN)
def test_picks_are_the_released_ones_in_order(name):
    stored, excluded = golden(name)
    covers = coverage(stored["in.x"], stored["in.v"], stored["in.text"])
    order = cover_order(covers, len(stored["mid.order"]), excluded)
    assert torch.equal(order, stored["mid.order"])
    assert torch.equal(order.sort().values, stored["out.indices"])


def test_the_selector_s_defaults_are_the_released_ones():
    stored, _ = golden("mmtok_n576_m9_k64")
    visual = replace(
        made_up(1, 576, 64),
        embeddings=stored["in.x"].unsqueeze(0),
        features=stored["in.v"].unsqueeze(0),
        text=stored["in.text"].unsqueeze(0),
        text_mask=torch.ones(1, 9, dtype=torch.bool),
    )
    method = MMTok(num_keep=64)
    assert method.needs == ("features", "text")
    assert torch.equal(method.select(visual, 64)[0], stored["out.indices"])
    for other in ({"alpha": 0.0}, {"alpha": 2}, {"word_temperature": 0.2}, {"image_temperature": 0.02}):
        assert not torch.equal(MMTok(num_keep=64, **other).select(visual, 64)[0], stored["out.indices"])


@pytest.mark.parametrize("fault", ["features swapped", "not normalised", "words left out", "excluded don't count"])
def test_planted_faults_miss_the_released_picks(fault):
    stored, excluded = golden("mmtok_n40_m5_k10_exclude")
    x, features, words = (stored[name].float() for name in ("in.x", "in.v", "in.text"))
    if fault == "features swapped":
        features = x
    covers = coverage(x, features, words)
    if fault == "not normalised":
        covers[:, 5:] = 0.5 / 40 * (features @ features.T / 0.2).softmax(0)
    if fault == "words left out":
        covers = covers[:, 5:]
    if fault == "excluded don't count":
        covers = coverage(x[~excluded], features[~excluded], words)
        order = (~excluded).nonzero().squeeze(1)[cover_order(covers, 10)]
    else:
        order = cover_order(covers, 10, excluded)
    assert not torch.equal(order, stored["mid.order"])


@pytest.mark.parametrize(("length", "words"), [(1, 1), (7, 3), (40, 2), (65, 33)])
@pytest.mark.parametrize("knobs", [(0.5, 0.02, 0.2), (1.5, 0.1, 0.05)])
def test_coverage_is_that_of_the_naive_twin(length, words, knobs):
    visual = made_up(1, length, 12, frames=1)
    tokens, features, text = visual.embeddings[0], visual.features[0], torch.randn(words, 12)
    covers = coverage(tokens, features, text, *knobs)
    expected = naive_coverage(tokens, features, text, knobs)
    torch.testing.assert_close(covers.T.double(), expected, rtol=1e-4, atol=1e-9)
    total = torch.tensor([1.0, knobs[0]])  # all that words, and all that tokens, have to give
    torch.testing.assert_close(torch.stack([covers[:, :words].sum(), covers[:, words:].sum()]), total)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_looking_at_few_candidates_picks_what_looking_at_all_does(data):
    length, things = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    if data.draw(st.booleans()):  # sums are exact, so that ties are ties
        covers = torch.randint(0, 4, (length, things), generator=generator) / 4
    else:
        covers = torch.rand(length, things, generator=generator) ** 4
    excluded = torch.rand(length, generator=generator) < 0.2
    allowed = int((~excluded).sum())
    if not allowed:
        return
    num_keep = data.draw(st.integers(1, allowed))
    order = cover_order(covers, num_keep, excluded)
    assert order.tolist() == naive_order(covers, num_keep, excluded)


def test_few_candidates_are_looked_at(monkeypatch):
    visual = made_up(1, 400, 32)
    covers = coverage(visual.embeddings[0], visual.features[0], visual.text[0, visual.text_mask[0]])
    looked_at, minimum = [], torch.minimum
    monkeypatch.setattr(torch, "minimum", lambda a, b: (looked_at.append(a.numel()), minimum(a, b))[1])
    order = cover_order(covers, 100)
    assert order.tolist() == naive_order(covers, 100, torch.zeros(400, dtype=torch.bool))
    assert sum(looked_at) < 100 * 400 / 2


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(("length", "width"), [(5, 64), (9, 64), (19, 64), (50, 33), (97, 100), (330, 64)])
def test_equal_tokens_tie_exactly_whatever_their_position(length, width, count):
    generator = torch.Generator().manual_seed(1)
    kind = torch.randint(6, (length,), generator=generator)
    kind[[0, -1]] = 3
    visual = repeated(made_up(1, 6, width), kind.tolist())
    words = torch.randn(count, width, generator=generator)
    covers = coverage(visual.embeddings[0], visual.features[0], words)
    for one in kind.unique():
        assert (covers[kind == one] == covers[kind == one][:1]).all()
    picks = cover_order(covers, len(kind.unique())).tolist()
    assert all(pick == kind.tolist().index(kind[pick]) for pick in picks)


def test_what_adds_nothing_goes_to_the_lowest_index():
    assert cover_order(torch.ones(6, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert cover_order(torch.zeros(4, 3), 3, torch.tensor([True, False, False, False])).tolist() == [1, 2, 3]


def test_bad_input_says_what_is_allowed():
    for num_keep in (0, 6):
        with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.5 .* got {num_keep}"):
            cover_order(torch.rand(6, 3), num_keep, torch.arange(6) == 2)
    visual = made_up()
    with pytest.raises(ValueError, match=r"give `features`, \(B, N, C\)"):
        MMTok(num_keep=5).select(replace(visual, features=None), 5)
    visual.features[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"image \[1\].*NaN"):
        MMTok(num_keep=5).select(visual, 5)
    for alpha in (-1, math.inf, "1"):
        with pytest.raises(ValueError, match="alpha must be a number of at least 0"):
            MMTok(num_keep=5, alpha=alpha)
    for name in ("word_temperature", "image_temperature"):
        with pytest.raises(ValueError, match=f"{name} must be a number above 0, got 0"):
            MMTok(num_keep=5, **{name: 0})
