"""The attention diversification loss against the released code's numbers and a plain version through autograd."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from eval.measure import cpu_allocations
from vltok.methods.adl import diversification as module
from vltok.methods.adl.diversification import score_diversification_loss
from vltok.nn import AttentionDiversificationLoss, attention_diversification_loss

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "tapadl.json").read_text())["adl"]
GOLDEN = load_file(DATA / "adl.safetensors")
CHUNKS = pytest.mark.parametrize("chunk", [1, 60, 700, 2**18])


def plain(maps: list[torch.Tensor], threshold: float) -> torch.Tensor:
    losses = []
    for each in maps:
        means = each.mean(1)
        average, least = means.mean(1, keepdim=True), threshold / means.shape[-1]
        average, means = torch.where(average > least, average, 0), torch.where(means > least, means, 0)
        losses.append(F.cosine_similarity(average, means, dim=-1).mean())
    return sum(losses) / len(losses)


def attention(batch: int = 3, heads: int = 2, count: int = 21, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, count, count, generator=rng, dtype=torch.float64) * sharpness
    return (scores + torch.randn(count, generator=rng, dtype=torch.float64) * sharpness).softmax(-1).requires_grad_()


def projections(*shape: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = shape or (3, 2, 21, 4)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_losses_and_gradients_are_the_released_codes(case):
    prefix = f"c{case['case']}."
    names = sorted(name for name in GOLDEN if name.startswith(f"{prefix}in.attn"))
    maps = [GOLDEN[name].clone().requires_grad_() for name in names]
    loss = attention_diversification_loss(maps, case["threshold"])
    grads = torch.autograd.grad(loss, maps)
    if case["batch1_quirk"]:
        assert case["loss"] == 0  # what the released code says of a single picture
        assert loss.item() == pytest.approx(plain(maps, case["threshold"]).item(), abs=1e-6)
        return
    assert loss.item() == pytest.approx(case["loss64"], abs=1e-6)
    compared = 0
    for name, grad in zip(names, grads, strict=True):
        expected = GOLDEN.get(name.replace("in.", "grad."))
        if expected is not None:
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5 * max(expected.abs().max().item(), 1e-2))
            compared += 1
    assert compared


@CHUNKS
@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.0, 5.0])
def test_maps_give_what_autograd_gives(threshold, chunk, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    maps = [attention(), attention(1, 3, 9, seed=1)]
    loss, expected = attention_diversification_loss(maps, threshold), plain(maps, threshold)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, maps), torch.autograd.grad(expected, maps), strict=True):
        torch.testing.assert_close(mine, theirs)


@CHUNKS
@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.0, 5.0])
def test_queries_and_keys_give_what_their_maps_give(threshold, chunk, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    scores = projections()
    loss = score_diversification_loss(*scores, 0.7, threshold)
    expected = plain([(0.7 * scores[0] @ scores[1].mT).softmax(-1)], threshold)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_has_the_mean_loss_of_its_samples():
    maps = attention()
    alone = [attention_diversification_loss(maps[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(attention_diversification_loss(maps), sum(alone) / 3)


def test_tokens_that_all_attend_to_the_same_have_loss_1_and_to_themselves_alone_0():
    same = torch.zeros(2, 3, 8, 8)
    same[..., 2] = 1
    assert attention_diversification_loss(same).item() == pytest.approx(1)
    own = torch.eye(8).expand(2, 3, 8, 8)
    assert attention_diversification_loss(own, 2).item() == 0, "the average of 1/8 does not exceed 2/8"
    assert attention_diversification_loss(own, 0.5).item() == pytest.approx(8**-0.5)


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_where_nothing_exceeds_the_threshold_the_loss_and_its_gradient_are_0(threshold):
    maps = torch.full((2, 3, 8, 8), 1 / 8).requires_grad_()
    loss = attention_diversification_loss(maps, threshold)
    loss.backward()
    assert loss == 0
    assert (maps.grad == 0).all()
    scores = [torch.zeros(2, 3, 8, 4).requires_grad_() for _ in range(2)]
    loss = score_diversification_loss(*scores, 1.0, threshold)
    loss.backward()
    assert loss == 0
    assert all((each.grad == 0).all() for each in scores)


def test_one_token_is_no_trouble():
    loss = score_diversification_loss(*projections(2, 2, 1, 4), 1.0, 0.5)
    assert loss == 1


def test_gradients_are_those_of_finite_differences():
    scores = projections(2, 2, 5, 3)
    assert torch.autograd.gradcheck(lambda q, k: score_diversification_loss(q, k, 0.9, 1.2), scores)
    assert torch.autograd.gradgradcheck(lambda q, k: score_diversification_loss(q, k, 0.9, 1.2), scores)
    for function in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert function(lambda a: attention_diversification_loss(a, 1.2), attention(2, 2, 5))


@pytest.mark.parametrize("threshold", [0.3, 2.0])
def test_what_a_compiler_gets_is_what_autograd_gives(threshold):
    scores, maps = projections(), attention()
    for found, expected, own in (
        (module.map_loss(maps, threshold), plain([maps], threshold), [maps]),
        (
            module.score_loss(*scores, 0.7, threshold),
            plain([(0.7 * scores[0] @ scores[1].mT).softmax(-1)], threshold),
            scores,
        ),
    ):
        torch.testing.assert_close(found, expected)
        pairs = (torch.autograd.grad(loss, own) for loss in (found, expected))
        for pair in zip(*pairs, strict=True):
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    maps = attention().detach().to(dtype).requires_grad_()
    loss = attention_diversification_loss(maps)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain([maps.detach().float()], 2.0))
    loss.backward()
    assert maps.grad.dtype == dtype
    scores = [each.detach().to(dtype).requires_grad_() for each in projections()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = score_diversification_loss(*scores, 0.7, 1.2)
    wide = [each.detach().float() for each in scores]
    torch.testing.assert_close(loss, plain([(0.7 * wide[0] @ wide[1].mT).softmax(-1)], 1.2))
    loss.backward()
    assert all(each.grad.dtype == dtype for each in scores)


@pytest.mark.parametrize("scaler", [2**12, 2**16, 2**18])
def test_gradients_of_float16_survive_a_loss_scaler(scaler):
    """Unscaled, most of them are smaller than float16 can hold; a scale may be larger than it can."""
    scores = [each.detach().half().requires_grad_() for each in projections(32, 6, 64, 8)]
    wide = [each.detach().double().requires_grad_() for each in scores]
    grads = torch.autograd.grad(score_diversification_loss(*scores, 0.4, 0.8) * scaler, scores)
    expected = torch.autograd.grad(plain([(0.4 * wide[0] @ wide[1].mT).softmax(-1)], 0.8), wide)
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float16
        error = (mine.double() / scaler - theirs).norm() / theirs.norm()
        assert error < 1e-3


def test_maps_of_all_heads_and_samples_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 2000)
    query, key = (each.detach().float().requires_grad_() for each in projections(8, 6, 40, 4))
    allocated = [size for _, size in cpu_allocations(lambda: score_diversification_loss(query, key, 1.0).backward())]
    assert max(allocated) == query.nbytes, "one gradient; a map of all heads has ten times as many numbers"
    assert max(itertools.accumulate(allocated)) < 7 * query.nbytes
    maps = attention(8, 6, 40).detach().float().requires_grad_()

    def run() -> None:
        (grad,) = torch.autograd.grad(attention_diversification_loss(maps), maps)
        assert grad.shape == maps.shape

    allocated = [size for _, size in cpu_allocations(run)]
    assert max(allocated) == maps.nbytes / 6, "the mean over the heads"
    assert max(itertools.accumulate(allocated)) <= maps.nbytes


def test_without_gradients_none_are_computed():
    scores = projections()
    with torch.no_grad():
        loss = score_diversification_loss(*scores, 0.7)
    assert not loss.requires_grad
    detached = [each.detach() for each in scores]
    assert score_diversification_loss(*detached, 0.7) == loss
    assert [x.numel() for x in module._lean_score_loss(*detached, 0.7, 2.0, with_grad=False)[1:]] == [0, 0]


def test_the_module_is_the_function():
    maps = attention()
    assert torch.equal(AttentionDiversificationLoss(1.5)(maps), attention_diversification_loss(maps, 1.5))
    assert "threshold=1.5" in repr(AttentionDiversificationLoss(1.5))


@pytest.mark.parametrize(
    ("maps", "error", "words"),
    [
        ([], ValueError, "got none"),
        (torch.zeros(2, 8, 8), ValueError, r"attention must be \(B, heads, N, N\)"),
        (torch.zeros(2, 3, 8, 7), ValueError, r"attention must be \(B, heads, N, N\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "float dtype, got torch.int64"),
        ([None], TypeError, "got NoneType"),
    ],
)
def test_what_is_no_attention_is_refused(maps, error, words):
    with pytest.raises(error, match=words):
        attention_diversification_loss(maps)


@pytest.mark.parametrize(
    ("threshold", "error"), [(0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("2", TypeError)]
)
def test_thresholds_out_of_range_are_refused(threshold, error):
    with pytest.raises(error, match="threshold must be"):
        AttentionDiversificationLoss(threshold)
    with pytest.raises(error, match="threshold must be"):
        score_diversification_loss(*projections(), 0.7, threshold)


def test_queries_and_keys_of_other_shapes_are_refused():
    query, key = projections()
    with pytest.raises(ValueError, match="query and key must both be"):
        score_diversification_loss(query, key[:, :, 1:], 0.7)
