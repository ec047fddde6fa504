"""Greedy diversity: golden picks, a slow reference, ties, precision and the promises to a batch."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from visual import exact_row

from vltok.kernels import greedy as kernel
from vltok.methods.pruning import greedy
from vltok.methods.pruning.divprune import max_min_order, select_max_min
from vltok.methods.pruning.todre import diverse_order, select_diverse

DATA = Path(__file__).parent.parent / "data"
PIVOTS = {"todre_select_n48_d16": (0, 7, 47), "todre_select_n576_d64": (0, 226, 575)}
STRATEGIES = ("max_sum", "k_center")


@pytest.fixture(params=[True, False], ids=["gram", "rows"])
def route(request, monkeypatch):
    """Force one of the two ways to the same similarities."""
    monkeypatch.setattr(greedy, "gram_is_cheaper", lambda tokens, num_rows: request.param)


def golden(name: str, strategy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stored = load_file(DATA / f"{name}.safetensors")
    picks = torch.stack([stored[f"p{i}.{strategy}.indices"] for i in range(3)])
    return stored["in.x"].expand(3, -1, -1), torch.tensor(PIVOTS[name]), picks


def unit(tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.double()
    return tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def scores(cosine: torch.Tensor, picked: list[int], strategy: str) -> torch.Tensor:
    """How similar each token is to those picked, by the definition, float64."""
    rows = cosine[picked]
    return rows.sum(0) if strategy == "max_sum" else rows.amax(0)


def slow_order(tokens: torch.Tensor, num_keep: int, pivot: int, strategy: str) -> list[int]:
    cosine = unit(tokens) @ unit(tokens).T
    picked = [pivot]
    while len(picked) < num_keep:
        score = scores(cosine, picked, strategy).tolist()
        picked.append(min((i for i in range(len(score)) if i not in picked), key=lambda i: (score[i], i)))
    return picked


def assert_greedy(tokens: torch.Tensor, picks: list[int], strategy: str) -> None:
    """Every pick has the smallest score among what was left, up to float32."""
    cosine = unit(tokens) @ unit(tokens).T
    assert len(set(picks)) == len(picks)
    for step in range(1, len(picks)):
        score = scores(cosine, picks[:step], strategy)
        left = [i for i in range(len(score)) if i not in picks[:step]]
        assert score[picks[step]] <= score[left].min() + 1e-6 * step


def clustered(batch: int, length: int, width: int, seed: int = 0) -> torch.Tensor:
    """Tokens with a common direction, unequal norms and near neighbours, as visual tokens have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, 9, width, generator=generator) + 1
    which = torch.randint(9, (batch, length, 1), generator=generator).expand(-1, -1, width)
    noise = torch.randn(batch, length, width, generator=generator)
    return (centres.gather(1, which) + 0.3 * noise) * torch.rand(batch, length, 1, generator=generator).add(0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", PIVOTS)
def test_picks_equal_the_golden_vectors_in_order(name, strategy, route):
    tokens, pivots, picks = golden(name, strategy)
    assert torch.equal(diverse_order(tokens.float(), picks.shape[1], pivots, strategy), picks)
    assert torch.equal(diverse_order(tokens, 20, pivots, strategy), picks[:, :20])  # float16, and a smaller budget
    assert torch.equal(select_diverse(tokens, 20, pivots, strategy), picks[:, :20].sort(1).values)


@pytest.mark.parametrize("name", ["divprune_n576_d256", "divprune_n2880_d128"])
def test_divprune_picks_equal_the_released_code(name):
    stored = load_file(DATA / f"{name}.safetensors")
    picks = stored["out.indices"]
    assert torch.equal(max_min_order(stored["in.x"].unsqueeze(0), len(picks))[0], picks)
    assert torch.equal(select_max_min(stored["in.x"].unsqueeze(0).float(), 58)[0], picks[:58].sort().values)


def test_divprune_takes_one_token_of_every_group_of_equal_ones():
    stored = load_file(DATA / "divprune_duplicates.safetensors")
    picks = max_min_order(stored["in.x"].unsqueeze(0), 60)[0]
    assert len(stored["in.group"][picks[:12]].unique()) == 12
    assert len(picks.unique()) == 60


@pytest.mark.parametrize("fault", ["bfloat16 similarity", "not masked", "first row for all", "not normalised"])
def test_planted_faults_miss_the_golden_picks(fault, monkeypatch):
    right = kernel.follow

    def follow(row_of, first, num_keep, score, scale):
        def wrong_row_of(index):
            row = row_of(index[:1].expand_as(index) if fault == "first row for all" else index)
            if fault == "bfloat16 similarity":
                row = row.bfloat16().float()
            return row.clamp(max=1.0) if fault == "not masked" else row

        return right(wrong_row_of, first, num_keep, score, scale)

    monkeypatch.setattr(kernel, "follow", follow)
    if fault == "not normalised":
        monkeypatch.setattr(greedy, "_inverse", torch.ones_like)
    wrong = 0
    for strategy in STRATEGIES:
        tokens, pivots, picks = golden("todre_select_n576_d64", strategy)
        wrong += not torch.equal(diverse_order(tokens.float(), 58, pivots, strategy), picks)
        tokens, pivots, picks = golden("todre_select_n48_d16", strategy)
        wrong += not torch.equal(diverse_order(tokens.float(), 48, pivots, strategy), picks)
    assert wrong


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 7, 3), (3, 50, 33), (2, 577, 24), (2, 410, 256)])
def test_every_pick_is_the_least_similar_one_left(batch, length, width, strategy, route):
    tokens = clustered(batch, length, width)
    pivots = torch.arange(batch) * 2
    order = diverse_order(tokens, min(length, 40), pivots, strategy)
    for x, picks, pivot in zip(tokens, order.tolist(), pivots.tolist(), strict=True):
        assert picks[0] == pivot
        assert_greedy(x, picks, strategy)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(exact_row, min_size=1, max_size=40),
    data=st.data(),
    strategy=st.sampled_from(STRATEGIES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    gram=st.booleans(),
)
def test_ties_duplicates_and_zero_rows_follow_the_definition_exactly(rows, data, strategy, dtype, gram):
    tokens = torch.tensor(rows, dtype=dtype)
    num_keep = data.draw(st.integers(1, len(rows)))
    pivot = data.draw(st.integers(0, len(rows) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "gram_is_cheaper", lambda tokens, num_rows: gram)
        picks = diverse_order(tokens.unsqueeze(0), num_keep, torch.tensor([pivot]), strategy)
    assert picks.dtype == torch.int64
    assert picks[0].tolist() == slow_order(tokens, num_keep, pivot, strategy)


@pytest.mark.parametrize(
    ("length", "width"), [(5, 1000), (9, 64), (11, 4096), (50, 33), (577, 1000), (577, 1003), (579, 256), (800, 256)]
)
def test_equal_tokens_tie_exactly_whatever_their_position(length, width):
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(4, width, generator=generator)
    kind = torch.randint(4, (length,), generator=generator)
    kind[[0, -1]] = 3
    for num_keep in (min(length, 8), min(length, 200)):
        picks = diverse_order(kinds[kind].unsqueeze(0), num_keep, torch.tensor([0]))[0].tolist()
        for step, pick in enumerate(picks[1:], 1):
            same = [i for i in range(length) if kind[i] == kind[pick] and i not in picks[:step]]
            assert pick == min(same)


@pytest.mark.parametrize("length", [2, 3, 5, 17, 50])
@pytest.mark.parametrize("width", [36, 40, 64])
def test_a_product_with_equal_rows_is_equal(length, width):
    x = torch.randn(width, generator=torch.Generator().manual_seed(length)).repeat(length, 1)
    out = torch.empty(length, 1)
    for seed in range(20):
        greedy.times_row(x, torch.randn(width, 1, generator=torch.Generator().manual_seed(seed)), out)
        assert (out == out[0]).all()


def test_divprune_copes_with_zero_rows_and_equal_tokens():
    tokens = torch.zeros(2, 6, 4)
    tokens[1] = 0.3
    assert max_min_order(tokens, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    tokens[0, 4, 1] = 1.0
    assert max_min_order(tokens, 6)[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # a zero row is as far from anything as from a zero row


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_a_batch_do_not_depend_on_each_other(strategy, route):
    tokens, pivots = clustered(4, 300, 64), torch.tensor([0, 5, 299, 17])
    together = select_diverse(tokens, 60, pivots, strategy)
    alone = [select_diverse(tokens[i : i + 1], 60, pivots[i : i + 1], strategy) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    shuffle = torch.tensor([2, 0, 3, 1])
    assert torch.equal(select_diverse(tokens[shuffle], 60, pivots[shuffle], strategy), together[shuffle])
    assert len({tuple(row) for row in together.tolist()}) == 4


def test_a_batch_larger_than_memory_is_taken_in_parts(monkeypatch):
    tokens, pivots = clustered(5, 100, 16), torch.arange(5)
    whole, isolated = diverse_order(tokens, 30, pivots), max_min_order(tokens, 30)
    monkeypatch.setattr(greedy, "GRAM_ENTRIES", 2 * 100**2)
    assert torch.equal(diverse_order(tokens, 30, pivots), whole)
    assert torch.equal(max_min_order(tokens, 30), isolated)


def test_memory_layout_gradients_and_inference_mode_change_nothing():
    tokens, pivots = clustered(2, 200, 32), torch.tensor([1, 2])
    expected = select_diverse(tokens, 20, pivots)
    assert torch.equal(select_diverse(tokens.mT.contiguous().mT, 20, pivots.int()), expected)
    assert torch.equal(select_diverse(tokens.requires_grad_(), 20, pivots), expected)
    with torch.inference_mode():
        assert torch.equal(select_diverse(tokens.clone(), 20, pivots), expected)
    before = tokens.detach().clone()
    select_diverse(tokens, 20, pivots)
    assert torch.equal(tokens, before)


# Precision


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_tokens_get_the_picks_of_float32_similarity(strategy, route):
    tokens, pivots = clustered(2, 400, 256).bfloat16(), torch.tensor([3, 4])
    order = diverse_order(tokens, 60, pivots, strategy)
    assert torch.equal(order, diverse_order(tokens.float(), 60, pivots, strategy))
    for x, picks in zip(tokens, order.tolist(), strict=True):
        assert_greedy(x, picks, strategy)


def test_autocast_does_not_reach_the_similarity(route):
    tokens, pivots = clustered(1, 400, 256), torch.tensor([3])
    expected = diverse_order(tokens, 100, pivots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(diverse_order(tokens, 100, pivots), expected)


@contextlib.contextmanager
def products_seen(monkeypatch) -> list[str]:
    """The precision that float32 products were allowed, product by product."""
    seen, multiply = [], greedy._multiply

    def watched(a, b, out):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        multiply(a, b, out)

    monkeypatch.setattr(greedy, "_multiply", watched)
    yield seen


@pytest.mark.parametrize("setting", ["none", "ieee", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_bfloat16_tokens_use_bfloat16_units_and_the_setting_is_put_back(setting, dtype, monkeypatch):
    matmul = torch.backends.mkldnn.matmul
    tokens, pivots = clustered(1, 400, 256).to(dtype), torch.tensor([3])
    expected = diverse_order(tokens, 100, pivots)
    monkeypatch.setattr(greedy, "cpu_multiplies_bfloat16", lambda: True)
    matmul.fp32_precision = setting
    try:
        with products_seen(monkeypatch) as seen:
            assert torch.equal(diverse_order(tokens, 100, pivots), expected)
        assert matmul.fp32_precision == setting
        tokens[0, 5, 6] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            diverse_order(tokens, 100, pivots)
        with pytest.raises(RuntimeError, match="planted"), greedy.float32_products(tokens, matrix_units=True):
            raise RuntimeError("planted")
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = "none"
    exact = {"none", "ieee"} - ({"none"} if setting == "bf16" else set())
    assert set(seen) <= ({"bf16"} if dtype == torch.bfloat16 else exact)


def test_threads_do_not_put_back_each_other_s_setting(monkeypatch):
    monkeypatch.setattr(greedy, "cpu_multiplies_bfloat16", lambda: True)
    matmul, entered, left, seen = torch.backends.mkldnn.matmul, threading.Event(), threading.Event(), []

    def half() -> None:
        with greedy.float32_products(torch.ones(1, dtype=torch.bfloat16), matrix_units=True):
            entered.set()
            left.wait(0.3)  # time for the other to come in, were it not kept out
        left.set()

    def single() -> None:
        entered.wait(10)
        with greedy.float32_products(torch.ones(1)):
            seen.append(matmul.fp32_precision)
            left.wait(10)

    threads = [threading.Thread(target=half), threading.Thread(target=single)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    setting, matmul.fp32_precision = matmul.fp32_precision, "none"
    assert setting == "none"
    assert seen in (["none"], ["ieee"])


def test_the_route_follows_the_size():
    wide = torch.empty(1, 2880, 4096, device="meta")
    tokens = torch.empty(1, 2880, 4096)
    assert not greedy.gram_is_cheaper(tokens, 8)
    assert greedy.gram_is_cheaper(tokens, 287)
    assert not greedy.gram_is_cheaper(wide, 8)  # not a CPU
    assert greedy.gram_is_cheaper(wide, 287)


class HostWaits(TorchDispatchMode):
    """Counts the operations whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("num_keep", [1, 5, 50])
def test_the_host_waits_once_however_many_tokens_are_kept(num_keep, route):
    tokens, pivots = clustered(2, 100, 16), torch.tensor([3, 4])
    with HostWaits() as waits:
        select_diverse(tokens, num_keep, pivots)
    assert waits.count == 1
    with HostWaits() as waits:
        select_max_min(tokens, num_keep)
    assert waits.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_picks_the_same(strategy, dtype, route):
    tokens, pivots = clustered(2, 576, 256).to(dtype), torch.tensor([3, 4])
    order = diverse_order(tokens.cuda(), 60, pivots.cuda(), strategy).cpu()
    for x, picks in zip(tokens, order.tolist(), strict=True):
        assert_greedy(x, picks, strategy)
    assert diverse_order(torch.ones(1, 40, 8, device="cuda"), 40, pivots[:1].cuda())[0, 1:5].tolist() == [0, 1, 2, 4]


# All similarities at once


@pytest.mark.parametrize(("length", "width"), [(1, 8), (15, 64), (50, 33), (577, 1000), (800, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_cosines_are_those_of_the_definition(length, width, dtype):
    tokens = clustered(2, length, width).to(dtype)
    tokens[0, -1] = 0
    tokens[1, -1] = tokens[1, 0]
    cosine = greedy.cosine_matrix(tokens)
    assert cosine.dtype == torch.float32 and not cosine.requires_grad
    torch.testing.assert_close(cosine.double(), unit(tokens) @ unit(tokens).mT, atol=2e-6, rtol=0)
    assert cosine[0, -1].count_nonzero() == 0
    assert torch.equal(cosine[1, -1], cosine[1, 0])
    assert torch.equal(greedy.cosine_matrix(tokens[1:].requires_grad_())[0], cosine[1])


# Bad input


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20])
@pytest.mark.parametrize("num_keep", [1, 4, 30])
def test_unusable_embeddings_are_refused_with_the_image_named(value, num_keep, route):
    tokens = clustered(3, 30, 8)
    tokens[1, 7, 2] = value
    with pytest.raises(ValueError, match=r"image \[1\].*NaN"):
        select_diverse(tokens, num_keep, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"image \[1\].*NaN"):
        select_max_min(tokens, num_keep)
    with pytest.raises(ValueError, match=r"image \[1\].*NaN"):
        greedy.check_usable(tokens)


@pytest.mark.parametrize("scale", [1e-9, 1e15])
def test_very_small_and_large_embeddings_are_compared_all_the_same(scale, route):
    tokens, pivots = clustered(1, 60, 8), torch.tensor([3])
    assert torch.equal(diverse_order(tokens * scale, 20, pivots), diverse_order(tokens, 20, pivots))


@pytest.mark.parametrize(
    ("tokens", "num_keep", "pivot", "strategy", "message"),
    [
        (torch.ones(2, 5, 3), 0, [0, 0], "max_sum", r"num_keep must be in 1\.\.5"),
        (torch.ones(2, 5, 3), 6, [0, 0], "max_sum", r"num_keep must be in 1\.\.5 .* got 6"),
        (torch.ones(2, 5, 3), 2, [0, 5], "max_sum", r"first picks must be in 0\.\.4, got \[0, 5\]"),
        (torch.ones(2, 5, 3), 2, [-1, 0], "k_center", r"first picks must be in 0\.\.4"),
        (torch.ones(2, 5, 3), 2, [0], "max_sum", r"first picks must be \(2,\) indices"),
        (torch.ones(2, 5, 3), 2, [0.0, 1.0], "max_sum", r"indices, got torch\.float32"),
        (torch.ones(5, 3), 2, [0], "max_sum", r"tokens must be \(B, N, D\) floats"),
        (torch.ones(1, 5, 3, dtype=torch.int64), 2, [0], "max_sum", r"tokens must be .* got torch\.int64"),
        (torch.ones(2, 5, 3), 2, [0, 0], "max-sum", "strategy must be one of 'max_sum', 'k_center', got 'max-sum'"),
    ],
)
def test_bad_arguments_say_what_is_allowed(tokens, num_keep, pivot, strategy, message):
    with pytest.raises(ValueError, match=message):
        select_diverse(tokens, num_keep, torch.tensor(pivot), strategy)


def test_first_picks_may_be_of_a_dtype_that_holds_no_length():
    tokens, first = clustered(2, 300, 16), torch.tensor([3, 100])
    assert torch.equal(diverse_order(tokens, 9, first.to(torch.int8)), diverse_order(tokens, 9, first))


def test_an_empty_batch_is_fine():
    assert select_diverse(torch.ones(0, 5, 3), 2, torch.empty(0, dtype=torch.int64)).shape == (0, 2)
