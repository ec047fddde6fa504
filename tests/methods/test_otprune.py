"""OTPrune: against the released picks, a naive twin, and ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from visual import made_up

from vltok.methods.pruning import greedy, otprune
from vltok.methods.pruning.otprune import OTPrune, transport_order

DATA = Path(__file__).parents[1] / "data"
GOLDEN = ["otprune_n576_d64_r0111", "otprune_n60_d12_r02"]


def kernel_of(tokens: torch.Tensor, gamma: float = 0.01) -> torch.Tensor:
    """K = I + gamma G G^T of G = z z^T, every channel of z at unit length over the tokens; float64."""
    z = tokens.double()
    z = z / z.norm(dim=0).clamp_min(1e-12)
    gram = z @ z.T
    return torch.eye(len(z), dtype=torch.float64) + gamma * gram @ gram.T


@pytest.mark.parametrize("name", GOLDEN)
def test_picks_are_the_released_ones_in_order(name):
    stored = load_file(DATA / f"{name}.safetensors")
    tokens, expected = stored["in.x"].unsqueeze(0), stored["out.order"]
    assert torch.equal(transport_order(tokens, len(expected))[0], expected)
    visual = made_up(1, *stored["in.x"].shape)
    visual.embeddings[:] = tokens
    assert torch.equal(OTPrune(num_keep=5).select(visual, len(expected))[0], stored["out.indices"])


@pytest.mark.parametrize("fault", ["tokens at unit length", "no identity", "gamma"])
def test_planted_faults_miss_the_released_picks(fault, monkeypatch):
    stored = load_file(DATA / "otprune_n576_d64_r0111.safetensors")
    tokens = stored["in.x"].float().unsqueeze(0)
    if fault == "tokens at unit length":
        tokens = torch.nn.functional.normalize(tokens, dim=2)
    if fault == "no identity":
        right = otprune.max_determinant_order
        monkeypatch.setattr(otprune, "max_determinant_order", lambda *args, ridge: right(*args))
    order = transport_order(tokens, 64, gamma=10.0 if fault == "gamma" else 0.01)[0]
    assert not torch.equal(order, stored["out.order"])


@pytest.mark.parametrize(("length", "width"), [(7, 12), (50, 33), (96, 8), (210, 48)])
def test_every_pick_adds_most_to_the_log_determinant(length, width):
    visual = made_up(2, length, width)
    num_keep = min(length, 16)
    for x, picks in zip(visual.embeddings, transport_order(visual.embeddings, num_keep, 0.5).tolist(), strict=True):
        kernel = kernel_of(x, 0.5)
        assert len(set(picks)) == num_keep
        for step, pick in enumerate(picks):
            left = [i for i in range(length) if i not in picks[:step]]
            inside = {i: [*picks[:step], i] for i in left}
            volume = {i: torch.logdet(kernel[inside[i]][:, inside[i]]).item() for i in left}
            assert volume[pick] >= max(volume.values()) - 1e-6


def test_a_token_that_outweighs_all_others_does_not_hide_them():
    x = made_up(1, 40, 64).embeddings
    x[0, 5] *= 1e4
    order = transport_order(x, 40)[0].tolist()
    assert sorted(order) == list(range(40))
    kernel = kernel_of(x[0])
    volume = [torch.logdet(kernel[[5, i]][:, [5, i]]).item() for i in range(40) if i != 5]
    assert order[0] == 5
    assert volume[order[1] - (order[1] > 5)] == pytest.approx(max(volume), abs=1e-5)


def test_equal_and_zero_tokens_go_to_the_lowest_index():
    assert transport_order(torch.zeros(2, 6, 4), 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    kinds = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    tokens = kinds[[2, 0, 1, 2, 3, 0, 1, 3, 2]].unsqueeze(0)
    order = transport_order(tokens, 9)[0].tolist()
    for group in ([0, 3, 8], [1, 5], [2, 6], [4, 7]):
        assert [i for i in order if i in group] == group


def test_a_batch_larger_than_memory_is_taken_in_parts(monkeypatch):
    tokens = made_up(5, 60, 16).embeddings
    whole = transport_order(tokens, 20)
    for module in (greedy, otprune):
        monkeypatch.setattr(module, "GRAM_ENTRIES", 2 * 60**2)
    assert torch.equal(transport_order(tokens, 20), whole)


def test_bad_input_says_what_is_allowed():
    for num_keep in (0, 6):
        with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.5 .* got {num_keep}"):
            transport_order(torch.randn(1, 5, 3), num_keep)


def test_an_empty_batch_is_fine():
    assert transport_order(torch.ones(0, 5, 3), 2).shape == (0, 2)
