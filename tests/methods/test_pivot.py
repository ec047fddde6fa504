"""Where ToDRE starts."""

from __future__ import annotations

import pytest
import torch

from vltok.methods.pruning.todre import choose_pivot

KEYS = torch.tensor([11, -7, 2**62])


@pytest.fixture
def tokens():
    return torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def attention():
    return torch.rand(3, 20, generator=torch.Generator().manual_seed(1))


def slow_cosines(tokens: torch.Tensor, among: list[int]) -> torch.Tensor:
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    mean = unit[among].mean(0)
    return unit @ mean / mean.norm()


def test_cls_is_the_most_attended_token(tokens, attention):
    assert torch.equal(choose_pivot(tokens, "cls", attention=attention), attention.argmax(1))
    assert torch.equal(choose_pivot(tokens, "auto", attention=attention), attention.argmax(1))


def test_auto_without_attention_is_center(tokens):
    assert torch.equal(choose_pivot(tokens), choose_pivot(tokens, "center"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_center_and_farthest_are_the_ends_of_the_cosine_to_the_mean(tokens, dtype):
    tokens = tokens.to(dtype)
    center, farthest = choose_pivot(tokens, "center"), choose_pivot(tokens, "farthest")
    for x, near, far in zip(tokens, center, farthest, strict=True):
        cosines = slow_cosines(x, list(range(20)))
        assert (near, far) == (cosines.argmax(), cosines.argmin())


def test_length_does_not_draw_the_center(tokens):
    tokens[:, 4] *= 1000  # a mean of the tokens as they are would be token 4
    weights = torch.rand(3, 20, 1) + 0.1
    assert torch.equal(choose_pivot(tokens * weights, "center"), choose_pivot(tokens, "center"))


@pytest.mark.parametrize("rule", ["cls", "center", "farthest", "random"])
def test_only_tokens_of_the_whole_picture_are_eligible(tokens, attention, rule):
    overview = torch.zeros(3, 20, dtype=torch.bool)
    overview[0, 3:9] = overview[1, :2] = overview[2, 19] = True
    attention[:2, -3:] = -torch.inf
    options = {"attention": attention, "image_keys": KEYS, "is_overview": overview}
    pivots = choose_pivot(tokens, rule, **options)
    assert overview.gather(1, pivots.unsqueeze(1)).all()
    if rule in ("center", "farthest"):
        cosines = slow_cosines(tokens[0], list(range(3, 9)))[3:9]
        assert pivots[0] - 3 == (cosines.argmax() if rule == "center" else cosines.argmin())


@pytest.mark.parametrize("rule", ["cls", "center", "farthest", "random"])
def test_a_picture_without_overview_takes_all_tokens(tokens, attention, rule):
    options = {"attention": attention, "image_keys": KEYS}
    none = torch.zeros(3, 20, dtype=torch.bool)
    assert torch.equal(choose_pivot(tokens, rule, is_overview=none, **options), choose_pivot(tokens, rule, **options))


@pytest.mark.parametrize("rule", ["cls", "center", "farthest", "random"])
def test_each_image_has_a_pivot_of_its_own(tokens, attention, rule):
    whole = choose_pivot(tokens, rule, attention=attention, image_keys=KEYS)
    for i in range(3):
        part = slice(i, i + 1)
        assert torch.equal(
            choose_pivot(tokens[part], rule, attention=attention[part], image_keys=KEYS[part]), whole[part]
        )


def test_random_follows_the_picture_and_the_seed_only(tokens):
    torch.manual_seed(0)
    one = choose_pivot(tokens, "random", image_keys=KEYS)
    state = torch.get_rng_state()
    assert torch.equal(choose_pivot(tokens + 1, "random", image_keys=KEYS), one)
    assert torch.equal(torch.get_rng_state(), state)
    draws = torch.stack([choose_pivot(tokens, "random", image_keys=KEYS, seed=seed) for seed in range(200)])
    assert len(draws[:, 0].unique()) == 20


def test_autocast_does_not_reach_the_similarity():
    tokens = torch.randn(20, 400, 8, generator=torch.Generator().manual_seed(0)) + 5
    expected = choose_pivot(tokens, "center")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choose_pivot(tokens, "center"), expected)


@pytest.mark.parametrize("rule", ["center", "farthest"])
@pytest.mark.parametrize("count", [5, 9, 17, 79])
def test_equal_tokens_tie_wherever_they_stand(rule, count):
    """As the newline tokens of a picture do, the last of which a matrix product may round in another way."""
    one = torch.randn(20, 1, 64, generator=torch.Generator().manual_seed(3))
    assert choose_pivot(one.repeat(1, count, 1), rule).tolist() == [0] * 20


def test_zero_rows_and_ties_go_to_the_lowest_index():
    assert choose_pivot(torch.zeros(2, 5, 3), "center").tolist() == [0, 0]
    assert choose_pivot(torch.ones(1, 5, 3), "farthest").tolist() == [0]
    assert choose_pivot(torch.ones(1, 5, 3), "cls", attention=torch.ones(1, 5)).tolist() == [0]
    assert choose_pivot(torch.empty(0, 5, 3), "center").shape == (0,)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("cls", "attention of the vision tower"),
        ("random", "needs image_keys"),
        ("centre", "pivot must be one of 'auto', 'cls', 'center', 'farthest', 'random', got 'centre'"),
    ],
)
def test_what_a_rule_lacks_is_named(tokens, rule, message):
    with pytest.raises(ValueError, match=message):
        choose_pivot(tokens, rule)
