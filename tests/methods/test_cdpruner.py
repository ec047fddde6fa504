"""CDPruner and the greedy determinant: against the released picks, a naive twin, ties, and at the end of the rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import made_up

from vltok.methods.pruning import greedy
from vltok.methods.pruning.cdpruner import (
    CDPruner,
    clip_relevance,
    conditional_order,
    relevance_weights,
    word_relevance,
)
from vltok.methods.pruning.determinant import max_determinant_order

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(params=[True, False], ids=["gram", "rows"])
def route(request, monkeypatch):
    """Force one of the two ways to the same similarities."""
    monkeypatch.setattr(greedy, "gram_is_cheaper", lambda tokens, num_rows: request.param)


def unit(tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.double()
    return tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def slow_relevance(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the released code calls relevance: minus the mean cosine with the texts in CLIP's space."""
    return -(unit(stored["in.image_embeds"]) @ unit(stored["in.text_embeds"]).T).mean(-1)


def question_of(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The question in CLIP's space, the same for all images: the mean of its segments' unit embeddings."""
    return unit(stored["in.text_embeds"]).mean(0).float().expand(len(stored["in.x"]), -1)


def residuals(cosine: torch.Tensor, picks: list[int]) -> torch.Tensor:
    """By how much each token multiplies the determinant of the picked: det S_P+i / det S_P = S_ii - S_iP S_PP^-1 S_Pi.

    With weights it is w_i^2 times that.
    """
    inverse = torch.linalg.pinv(cosine[picks][:, picks], hermitian=True, rtol=1e-10)
    return cosine.diagonal() - (cosine[:, picks] @ inverse * cosine[:, picks]).sum(1)


def slow_order(tokens: torch.Tensor, num_keep: int, weights: torch.Tensor) -> list[int]:
    weights, cosine = weights.double(), unit(tokens) @ unit(tokens).T
    picks: list[int] = []
    while len(picks) < num_keep:
        left = [i for i in range(len(tokens)) if i not in picks]
        residual = residuals(cosine, picks)
        new = [i for i in left if residual[i] > 1e-5]
        score = weights.square() * residual if new else weights
        picks.append(max(new or left, key=lambda i: (score[i].item(), -i)))
    return picks


@pytest.mark.parametrize("name", ["cdpruner_b3_n96_d48_k16", "cdpruner_n576_d208_k64"])
def test_picks_are_the_released_ones_in_order(name, route):
    stored = load_file(DATA / f"{name}.safetensors")
    expected = stored["out.order"]
    relevance = clip_relevance(stored["in.image_embeds"], question_of(stored))
    torch.testing.assert_close(relevance, slow_relevance(stored).float(), rtol=0, atol=1e-6)
    weights = relevance_weights(relevance, parity=True)
    torch.testing.assert_close(weights, stored["mid.relevance"], rtol=0, atol=1e-5)
    picks = conditional_order(stored["in.x"], relevance, expected.shape[1], parity=True)
    assert torch.equal(picks, expected)


def test_relevance_is_scaled_by_image_by_default():
    stored = load_file(DATA / "cdpruner_b3_n96_d48_k16.safetensors")
    tokens, relevance = stored["in.x"], slow_relevance(stored)
    picks = conditional_order(tokens, relevance, 16)
    assert not torch.equal(picks, stored["out.order"])
    for image in range(3):  # an image that is alone is scaled by itself in the released code, too
        one = slice(image, image + 1)
        assert torch.equal(conditional_order(tokens[one], relevance[one], 16, parity=True), picks[one])


@pytest.mark.parametrize("name", ["cdpruner_duplicates", "cdpruner_rank_deficient_n64_d8"])
def test_what_follows_the_last_independent_token_is_what_is_most_relevant(name, route):
    stored = load_file(DATA / f"{name}.safetensors")
    relevance, first = slow_relevance(stored), stored["mid.first_groups"]
    order = conditional_order(stored["in.x"], relevance, 20)[0]
    assert torch.equal(stored["in.group"][order[: len(first)]], first)
    assert len(order.unique()) == 20
    assert relevance[0, order[len(first) + 1 :]].diff().max() <= 0
    assert order.tolist() == slow_order(stored["in.x"][0], 20, relevance_weights(relevance)[0])


@pytest.mark.parametrize(
    "fault", ["no negative cosine", "not normalised", "relevance left out", "relevance not squared"]
)
def test_planted_faults_miss_the_released_picks(fault, monkeypatch):
    stored = load_file(DATA / "cdpruner_n576_d208_k64.safetensors")
    weights = relevance_weights(slow_relevance(stored))
    if fault == "not normalised":
        monkeypatch.setattr(greedy, "_inverse", torch.ones_like)
    if fault == "no negative cosine":
        right = greedy._rows_of_gram

        def rows_of_gram(tokens):
            rows = right(tokens)
            return rows._replace(row_of=lambda index: rows.row_of(index).clamp(min=0))

        monkeypatch.setattr(greedy, "_rows_of_gram", rows_of_gram)
    if fault.startswith("relevance"):
        weights = torch.ones_like(weights) if fault == "relevance left out" else weights.sqrt()
    assert not torch.equal(max_determinant_order(stored["in.x"], 64, weights), stored["out.order"])


@pytest.mark.parametrize(("batch", "length", "width"), [(1, 7, 12), (3, 50, 36), (2, 130, 48), (2, 16, 24)])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_every_pick_multiplies_the_determinant_most(batch, length, width, ridge, route):
    visual = made_up(batch, length, width)
    weights = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) + 0.05
    num_keep = min(length, width * 2 // 3)
    order = max_determinant_order(visual.embeddings, num_keep, weights, ridge)
    for x, weight, picks in zip(visual.embeddings, weights.double(), order.tolist(), strict=True):
        kernel = weight[:, None] * (unit(x) @ unit(x).T) * weight + ridge * torch.eye(length)
        assert len(set(picks)) == num_keep
        for step, pick in enumerate(picks):
            gain = residuals(kernel, picks[:step])
            left = [i for i in range(length) if i not in picks[:step]]
            assert gain[pick] >= gain[left].max() - 1e-5


# Unit rows along axes, and weights that are powers of two: every kernel and determinant is exact, so ties are ties.
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-2.0, 0.0, 0.5, 1.0])), min_size=1, max_size=30),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gram=st.booleans(),
)
def test_ties_duplicates_and_zero_rows_follow_the_definition_exactly(rows, data, dtype, gram):
    tokens = torch.zeros(len(rows), 8, dtype=dtype)
    for row, (axis, length) in zip(tokens, rows, strict=True):
        row[axis] = length
    draw = st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=len(rows), max_size=len(rows))
    weights = torch.tensor(data.draw(draw))
    num_keep = data.draw(st.integers(1, len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "gram_is_cheaper", lambda tokens, num_rows: gram)
        picks = max_determinant_order(tokens.unsqueeze(0), num_keep, weights.unsqueeze(0))
    assert picks[0].tolist() == exact_order(rows, weights.tolist(), num_keep)


def exact_order(rows: list[tuple[int, float]], weights: list[float], num_keep: int) -> list[int]:
    """The first of the heaviest tokens along each axis, heaviest first, then the heaviest of all others."""
    heaviest = sorted(range(len(rows)), key=lambda i: (-weights[i], i))
    axes: set[int] = set()
    new = []
    for i in heaviest:
        axis, length = rows[i]
        if length and axis not in axes:
            axes.add(axis)
            new.append(i)
    return (new + [i for i in heaviest if i not in new])[:num_keep]


@pytest.mark.parametrize(("length", "width"), [(9, 64), (50, 36), (577, 100), (579, 256)])
def test_equal_tokens_tie_exactly_whatever_their_position(length, width):
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(30, width, generator=generator)
    kind = torch.randint(30, (length,), generator=generator)
    kind[[0, -1]] = 3
    picks = max_determinant_order(kinds[kind].unsqueeze(0), len(kind.unique()))[0].tolist()
    assert len(set(kind[picks].tolist())) == len(picks)
    assert all(pick == kind.tolist().index(kind[pick]) for pick in picks)


def test_with_a_ridge_a_heavy_copy_still_counts_for_more_than_light_tokens(route):
    tokens, weights = torch.eye(6), torch.full((1, 6), 1e-3)
    tokens[1], weights[0, :2] = tokens[0], 1e3  # det grows by about 2 with the copy, and by 1 with any other
    assert max_determinant_order(tokens.unsqueeze(0), 6, weights, ridge=1.0).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_rows_of_a_batch_do_not_depend_on_each_other(route):
    tokens = made_up(4, 300, 64).embeddings
    relevance = torch.rand(4, 300, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1], [100], [1e-3], [0]])
    together = conditional_order(tokens, relevance, 60)
    for image in range(4):
        one = slice(image, image + 1)
        assert torch.equal(conditional_order(tokens[one], relevance[one], 60), together[one])
    assert torch.equal(conditional_order(tokens, relevance, 20), together[:, :20])


def test_a_batch_larger_than_memory_is_taken_in_parts(monkeypatch):
    visual = made_up(5, 100, 16)
    weights = torch.rand(5, 100)
    whole = max_determinant_order(visual.embeddings, 30, weights)
    monkeypatch.setattr(greedy, "GRAM_ENTRIES", 2 * 100**2)
    assert torch.equal(max_determinant_order(visual.embeddings, 30, weights), whole)


# Relevance


def test_relevance_is_the_cosine_with_the_mean_word():
    visual = made_up()
    words = [text[mask] for text, mask in zip(visual.text, visual.text_mask, strict=True)]
    relevance = word_relevance(visual.embeddings.bfloat16(), words)
    for x, text, row in zip(visual.embeddings.bfloat16(), words, relevance, strict=True):
        mean = sum(text) / len(text)
        expected = [torch.cosine_similarity(token.float(), mean, dim=0) for token in x]
        torch.testing.assert_close(row, torch.stack(expected))


def test_relevance_in_clip_is_minus_the_mean_cosine_and_least_for_zero_rows():
    generator = torch.Generator().manual_seed(1)
    image, segments = torch.randn(3, 20, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)
    image[0, 3] = image[0, 7] = image[1] = 0
    image[2, 5] = image[2, 9]
    relevance = clip_relevance(image, unit(segments).mean(1).float())
    for x, texts, row in zip(image, segments, relevance, strict=True):
        expected = torch.stack([-torch.cosine_similarity(token, texts).mean() for token in x])
        is_zero = (x == 0).all(1)
        expected[is_zero] = 0.0 if is_zero.all() else expected[~is_zero].min()
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    assert relevance[2, 5] == relevance[2, 9]
    assert torch.equal(clip_relevance(image[2:], unit(segments).mean(1).float()[2:])[0], relevance[2])


def test_the_released_sign_matters():
    stored = load_file(DATA / "cdpruner_n576_d208_k64.safetensors")
    relevance = clip_relevance(stored["in.image_embeds"], question_of(stored))
    assert not torch.equal(conditional_order(stored["in.x"], -relevance, 64, parity=True), stored["out.order"])


def test_the_method_asks_clip_where_it_is_told():
    method, visual = CDPruner(num_keep=7, relevance="clip"), made_up()
    assert method.needs == ("clip",)
    relevance = clip_relevance(visual.clip_image, visual.clip_text)
    expected = conditional_order(visual.embeddings, relevance, 7, theta=0.5).sort(1).values
    assert torch.equal(method.select(visual, 7), expected)
    assert not torch.equal(CDPruner(num_keep=7).select(visual, 7), expected)
    assert not torch.equal(method.select(replace(visual, clip_text=visual.clip_text.roll(1, 0)), 7), expected)


def test_what_clip_can_not_compare_is_refused():
    method, visual = CDPruner(num_keep=7, relevance="clip"), made_up()
    with pytest.raises(ValueError, match=r"give `clip_image`, \(B, N, E\), and `clip_text`"):
        method.select(replace(visual, clip_text=None), 7)
    visual.clip_text[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"text of image \[2\] of the batch is NaN or infinite in CLIP's space"):
        method.select(visual, 7)
    visual.clip_text[2] = 0
    with pytest.raises(ValueError, match=r"image \[2\] of the batch comes without a word .*; ask a question, or "):
        method.select(visual, 7)
    broken = made_up()
    broken.clip_image[1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match="weights of visual tokens hold NaN"):
        method.select(broken, 7)


def test_regions_share_one_question():
    """The question has no tokens to be cut, even where it is as wide as there are tokens."""
    visual = made_up(length=5, frames=1)
    assert visual.clip_text.shape[1] == visual.embeddings.shape[1]
    places = torch.stack([torch.zeros(5), torch.zeros(5), torch.arange(5)], 1).long().expand(3, 5, 3)
    visual = replace(visual, coordinates=places)
    kept = CDPruner(num_keep=2, relevance="clip", regions=(1, 2)).pick(visual, 2).indices
    assert kept.shape == (3, 2)


def test_more_theta_keeps_more_relevant_tokens():
    tokens = made_up(2, 200, 64).embeddings
    relevance = torch.rand(2, 200, generator=torch.Generator().manual_seed(1))
    kept = [conditional_order(tokens, relevance, 20, theta) for theta in (0.0, 0.5, 0.9)]
    diverse, both, relevant = (relevance.gather(1, picks).mean(1) for picks in kept)
    assert (diverse < both).all()
    assert (both < relevant).all()
    assert torch.equal(kept[0], conditional_order(tokens, None, 20))


@pytest.mark.parametrize("relevance", [torch.zeros(2, 40), torch.full((2, 40), -3.0)])
def test_flat_relevance_is_diversity_alone(relevance):
    tokens = made_up(2, 40, 16).embeddings
    expected = conditional_order(tokens, None, 30)
    for theta in (None, 0.0, 0.5):
        assert torch.equal(conditional_order(tokens, relevance, 30, theta), expected)
    assert torch.equal(conditional_order(tokens, torch.rand(2, 40), 12, theta=0.0), expected[:, :12])


def test_weights_by_hand():
    relevance = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    by_hand = torch.tensor([[5e-7, 1, 0.5], [1, 1, 1]])
    torch.testing.assert_close(relevance_weights(relevance), by_hand, rtol=0, atol=1e-6)
    e = torch.tensor(1.0).exp()
    expected = torch.stack([torch.ones(()), e**0.5, e**0.25])  # theta 1/2 is an exponent of 1/2
    torch.testing.assert_close(relevance_weights(relevance, theta=0.5)[0], expected, rtol=0, atol=1e-6)
    assert relevance_weights(relevance, parity=True)[0].tolist() == pytest.approx([2.5e-7, 0.5, 0.25], abs=1e-6)


def test_without_relevance_no_text_is_asked_for():
    assert CDPruner(num_keep=4).needs == ("text",)
    method = CDPruner(num_keep=4, relevance=None)
    assert method.needs == ()
    visual = made_up()
    expected = conditional_order(visual.embeddings, None, 4).sort(1).values
    assert torch.equal(method.select(visual, 4), expected)
    assert not torch.equal(CDPruner(num_keep=4).select(visual, 4), expected)


# Bad input


def test_bad_input_says_what_is_allowed():
    tokens = torch.randn(2, 5, 3)
    for num_keep in (0, 6):
        with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.5 .* got {num_keep}"):
            conditional_order(tokens, None, num_keep)
    with pytest.raises(ValueError, match="weights of visual tokens hold NaN"):
        conditional_order(tokens, torch.tensor([[0.1, torch.nan, 0, 0, 0]] * 2), 2)
    with pytest.raises(ValueError, match=r"one for each of \(2, 5\) tokens"):
        max_determinant_order(tokens, 2, torch.ones(2, 4))
    with pytest.raises(ValueError, match="relevance must be one of 'embeddings', 'clip', None, got 'siglip'"):
        CDPruner(num_keep=4, relevance="siglip")
    for theta in (1, -0.1, "0.5", True):
        with pytest.raises(ValueError, match=r"theta says how much relevance counts, in \[0, 1\)"):
            CDPruner(num_keep=4, theta=theta)


def test_an_empty_batch_is_fine():
    assert max_determinant_order(torch.ones(0, 5, 3), 2).shape == (0, 2)
