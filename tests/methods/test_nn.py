"""DiversitySelector, the selection as a module."""

from __future__ import annotations

import pytest
import torch

import vltok
from vltok.methods.pruning.todre import choose_pivot, select_diverse


@pytest.fixture
def tokens():
    return torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0)) + 0.5


def test_it_keeps_what_select_diverse_picks(tokens):
    selector = vltok.nn.DiversitySelector(keep_ratio=0.25, strategy="k_center")
    kept, indices = selector(tokens)
    assert torch.equal(indices, select_diverse(tokens, 10, choose_pivot(tokens, "center"), "k_center"))
    assert torch.equal(kept, torch.stack([x[i] for x, i in zip(tokens, indices, strict=True)]))


def test_attention_or_given_tokens_set_the_start(tokens):
    attention = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    selector = vltok.nn.DiversitySelector(num_keep=1)
    assert torch.equal(selector(tokens, attention=attention)[1][:, 0], attention.argmax(1))
    assert selector(tokens, first=torch.tensor([4, 5, 6]))[1].tolist() == [[4], [5], [6]]
    assert torch.equal(selector(tokens)[1][:, 0], choose_pivot(tokens, "center"))


def test_gradients_flow_through_the_kept_tokens_only(tokens):
    tokens.requires_grad_()
    kept, indices = vltok.nn.DiversitySelector(num_keep=4)(tokens)
    kept.sum().backward()
    expected = torch.zeros(3, 40).scatter(1, indices, 1.0)
    assert torch.equal(tokens.grad, expected.unsqueeze(-1).expand_as(tokens))


def test_it_has_no_weights_and_shows_its_settings():
    selector = vltok.nn.DiversitySelector(keep_ratio=0.1)
    assert not selector.state_dict()
    assert repr(selector) == "DiversitySelector(keep_ratio=0.1, strategy='max_sum', pivot='auto')"
    assert "num_keep=3" in repr(vltok.nn.DiversitySelector(num_keep=3))


def test_bad_input_is_refused(tokens):
    with pytest.raises(ValueError, match="exactly one of keep_ratio and num_keep"):
        vltok.nn.DiversitySelector()
    with pytest.raises(ValueError, match="strategy must be one of"):
        vltok.nn.DiversitySelector(keep_ratio=0.1, strategy="k-center")
    with pytest.raises(ValueError, match="pass them to forward"):
        vltok.nn.DiversitySelector(keep_ratio=0.1, pivot="random")
    assert vltok.nn.DiversitySelector(num_keep=41)(tokens)[1].shape == (len(tokens), 40)  # an upper bound
    tokens[2, 3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"image \[2\]"):
        vltok.nn.DiversitySelector(num_keep=4)(tokens)
    with pytest.raises(ValueError, match="attention of the vision tower"):
        vltok.nn.DiversitySelector(num_keep=4, pivot="cls")(tokens)
