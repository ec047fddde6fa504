"""VisPruner: against published picks, a naive twin, and at counts where the released code raises."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import cosines, exact_row, ranking, tower_tokens

from vltok.methods.pruning.vispruner import VisPruner, drop_duplicates, select_without_duplicates

DATA = Path(__file__).parents[1] / "data"


def naive(features: torch.Tensor, attention: torch.Tensor, num_keep: int, num_important: int) -> list[int]:
    order, cosine = ranking(attention), cosines(features).tolist()
    important, rest = order[:num_important], order[num_important:]
    while len(rest) > num_keep - num_important and num_keep > num_important:
        a, b = rest[0::2], rest[1::2]
        nearest = {i: round(max(cosine[i][j] for j in b), 9) for i in a}
        by_likeness = sorted(a, key=lambda i: (-nearest[i], a.index(i)))
        rest = by_likeness[min(8, len(rest) - (num_keep - num_important)) :] + b
    return sorted(important + rest[: num_keep - num_important])


@pytest.mark.parametrize(("name", "num_keep"), [("vispruner_n64_k16", 16), ("vispruner_n576_k64", 64)])
def test_picks_are_the_published_ones(name, num_keep):
    golden = load_file(DATA / f"{name}.safetensors")
    attention = golden["in.cls_attn"].mean(1)
    picks = select_without_duplicates(golden["in.x"], attention, num_keep, num_keep // 2)
    assert torch.equal(picks, golden["out.indices"])
    important = select_without_duplicates(golden["in.x"], attention, num_keep // 2, num_keep // 2)
    assert torch.equal(important, golden["mid.important"].sort(1).values)


@pytest.mark.parametrize("length", [60, 61])
@pytest.mark.parametrize(
    ("num_keep", "share"), [(1, 0.5), (2, 0.5), (6, 0.5), (13, 0.3), (20, 1.0), (50, 0.58), (59, 0.0)]
)
def test_picks_are_those_of_the_naive_twin(length, num_keep, share):
    visual = tower_tokens(length=length)
    picks = VisPruner(num_keep=num_keep, important=share).select(visual, num_keep)
    important = max(1, int(Fraction(str(share)) * num_keep))
    expected = [naive(x, a, num_keep, important) for x, a in zip(visual.features, visual.attention, strict=True)]
    assert picks.tolist() == expected


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(exact_row, st.sampled_from([0.0, 0.25, 0.5])), min_size=1, max_size=40), data=st.data())
def test_ties_duplicates_and_zero_rows_follow_the_definition_exactly(rows, data):
    features = torch.tensor([row for row, _ in rows])
    attention = torch.tensor([score for _, score in rows])
    num_keep = data.draw(st.integers(1, len(rows)))
    important = data.draw(st.integers(0, num_keep))
    picks = select_without_duplicates(features[None], attention[None], num_keep, important)
    assert picks[0].tolist() == naive(features, attention, num_keep, important)


def test_a_round_by_hand():
    cosine = torch.eye(5)
    for i, j, value in ((0, 1, 0.9), (2, 3, 0.5), (4, 1, 0.7)):
        cosine[i, j] = cosine[j, i] = value
    assert drop_duplicates(cosine, 4).tolist() == [4, 2, 1, 3]  # of 0, 2, 4 the first is most like one of 1, 3
    assert drop_duplicates(cosine, 3).tolist() == [2, 1, 3]
    assert drop_duplicates(cosine, 2).tolist() == [1, 3]
    assert drop_duplicates(cosine, 5).tolist() == [0, 1, 2, 3, 4]
    assert drop_duplicates(cosine, 0).tolist() == []


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"num_important must be in 0\.\.4 \(the kept tokens\), got 5"):
        select_without_duplicates(torch.ones(1, 9, 2), torch.rand(1, 9), 4, 5)
