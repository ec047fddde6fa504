"""PruMerge+: against published tokens, a naive twin, and at small images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import cosines, exact_row, ranking, tower_tokens

from vltok.methods.pruning.floors import select_stride
from vltok.methods.pruning.prumerge import PruMergePlus, adaptive_tokens, neighbour_weights, select_centres

DATA = Path(__file__).parents[1] / "data"


def naive_centres(attention: torch.Tensor, num_keep: int, num_attended: int) -> list[int]:
    attended = ranking(attention)[:num_attended]
    rest = [i for i in range(len(attention)) if i not in attended]
    spread = select_stride(len(rest), num_keep - num_attended).tolist() if num_keep > num_attended else []
    return sorted(attended + [rest[i] for i in spread])


def naive_tokens(values, keys, attention, centres: list[int], num_neighbours: int) -> torch.Tensor:
    """Of one image without newlines, float64."""
    cosine, out = cosines(keys), []
    for centre in centres:
        others = [i for i in range(len(values)) if i != centre]
        nearest = sorted(others, key=lambda i: (-round(cosine[centre, i].item(), 9), i))[:num_neighbours]
        out.append(values[centre].double() + sum(attention[i].double() * values[i].double() for i in nearest))
    return torch.stack(out)


@pytest.mark.parametrize(("name", "plus"), [("prumerge_n144", False), ("prumerge_plus_n576", True)])
def test_released_tokens_are_the_published_ones(name, plus):
    golden = load_file(DATA / f"{name}.safetensors")
    query, key, hidden = (golden[f"in.{each}"][0].float() for each in ("q", "k", "hidden"))
    attention = (query[:1] @ key.T / key.shape[1] ** 0.5).softmax(1)[0, 1:]
    tokens, centres = adaptive_tokens(hidden[1:], key[1:], attention, plus)
    assert torch.equal(centres, golden["mid.centres"])
    torch.testing.assert_close(tokens, golden["out.tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plus", [True, False])
def test_flat_attention_leaves_the_sum_of_all_where_the_released_code_divides_by_zero(plus):
    values = torch.randn(40, 8)
    tokens, centres = adaptive_tokens(values, values, torch.full((40,), 1 / 64), plus)
    assert len(centres) == 0
    torch.testing.assert_close(tokens, values.sum(0, keepdim=True) / 64)


def test_many_outliers_make_every_token_but_the_last_a_centre():
    attention = torch.cat([torch.linspace(0.2, 0.1, 5), torch.full((19,), 0.01)])  # 5 of 24 lie out, so s = 1
    tokens, centres = adaptive_tokens(torch.randn(24, 8), torch.randn(24, 8), attention)
    assert centres.tolist() == list(range(23))
    assert tokens.shape == (24, 8)


@pytest.mark.parametrize("neighbours", [0, 3, 32, 99])
@pytest.mark.parametrize(("num_keep", "share"), [(1, 0.25), (2, 0.25), (13, 0.25), (12, 1.0), (40, 0.0), (59, 0.5)])
def test_tokens_are_those_of_the_naive_twin(num_keep, share, neighbours):
    visual = tower_tokens()
    picked = PruMergePlus(num_keep=num_keep, attended=share, num_neighbours=neighbours).select(visual, num_keep)
    for image in range(3):
        attention = visual.attention[image] / visual.attention[image].sum()
        centres = naive_centres(attention, num_keep, max(1, round(share * num_keep)))
        assert picked.indices[image].tolist() == centres
        expected = naive_tokens(visual.features[image], visual.keys[image], attention, centres, neighbours)
        torch.testing.assert_close(picked.features[image].double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(exact_row, st.sampled_from([0.0, 0.25, 0.5])), min_size=1, max_size=30), data=st.data())
def test_ties_zero_keys_and_small_images_follow_the_definition_exactly(rows, data):
    keys = torch.tensor([key for key, _ in rows])
    attention = torch.tensor([score for _, score in rows])
    num_keep = data.draw(st.integers(1, len(rows)))
    attended = data.draw(st.integers(0, num_keep))
    neighbours = data.draw(st.integers(0, 8))
    centres = select_centres(attention[None], num_keep, attended)
    assert centres[0].tolist() == naive_centres(attention, num_keep, attended)
    weights = neighbour_weights(keys[None], attention[None], centres, neighbours)[0]
    expected = naive_tokens(torch.eye(len(rows)), keys, attention, centres[0].tolist(), neighbours)
    torch.testing.assert_close(weights.double(), expected)


@pytest.mark.parametrize(("num_keep", "attended"), [(1, 1), (3, 1), (4, 1), (64, 16), (128, 32)])
def test_a_quarter_is_picked_by_attention_and_at_least_one(num_keep, attended):
    visual = tower_tokens(length=300)
    kept = PruMergePlus(num_keep=num_keep).select(visual, num_keep).indices
    assert torch.equal(kept, select_centres(visual.attention, num_keep, attended))


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"num_attended must be in 0\.\.4 \(the kept tokens\), got 5"):
        select_centres(torch.rand(1, 9), 4, 5)
