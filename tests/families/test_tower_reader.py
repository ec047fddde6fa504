"""How attention in a tower is read and given to tokens, on modules and numbers small enough to follow."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltok.engine.attention import cls_attention, received_attention
from vltok.engine.patches import by_picture, fold, token_values
from vltok.engine.tower_attention import tower_attention
from vltok.errors import UnsupportedInputError, UnsupportedModelError

LOWEST = -torch.inf
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = [5, 3]  # tokens of two rows that are no padding, of 6


class Attention(nn.Module):
    """Attends as transformers' towers do: four heads, two of keys, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.q_norm = nn.LayerNorm(4)

    def heads(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = (
            project(states).unflatten(-1, (-1, 4)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(query), key, value

    def forward(self, states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attend(self, *self.heads(states), attention_mask, scaling=0.7, **kwargs)[0].flatten(2)


def naive(module: Attention, states: torch.Tensor, allowed: torch.Tensor, kind: str) -> torch.Tensor:
    """One query, head and row at a time; `allowed` says what each query may see, (B, S, S)."""
    query, key, _ = module.heads(states)
    out = torch.zeros(states.shape[:2])
    for row in range(len(states)):
        real = allowed[row].any(0).nonzero().flatten().tolist()
        for head in range(4):
            for place in real if kind == "received" else [0]:
                logits = 0.7 * query[row, head, place] @ key[row, head // 2].T
                weights = logits.masked_fill(~allowed[row, place], -torch.inf).softmax(-1)
                out[row] += weights / 4
    return out


def padding() -> torch.Tensor:
    """Which tokens are real, (2, 6)."""
    return torch.arange(6) < torch.tensor(LENGTHS)[:, None]


def as_keys(real: torch.Tensor) -> torch.Tensor:
    return real[:, None, None]


def added(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


REAL = padding()
BLOCKS = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool().expand(2, 6, 6)
SEEN = REAL[:, None].expand(2, 6, 6)
MASKS = {
    "none": (None, torch.ones(2, 6, 6).bool()),
    "keys, bool": (as_keys(REAL), SEEN),
    "keys, added": (added(as_keys(REAL)), SEEN),
    "keys and queries, bool": (as_keys(REAL).expand(2, 1, 6, 6), SEEN),
    "padding of flash attention": (REAL.long(), SEEN),
    "blocks, added": (added(BLOCKS)[:, None], BLOCKS),
}


@pytest.mark.parametrize("kind", ["cls", "received"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_that_of_the_module_under_its_mask(name, kind):
    module, states = Attention(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    mask, allowed = MASKS[name]
    before = dict(vars(module))
    actual, _ = tower_attention(module, (states,), {"attention_mask": mask}, kind)
    torch.testing.assert_close(actual, naive(module, states, allowed, kind), **CLOSE)
    assert vars(module) == before
    if kind == "received":
        counts = allowed.any(1).sum(1).float()
        torch.testing.assert_close(actual.sum(1), counts, **CLOSE)


def test_pieces_of_a_row_that_flash_attention_is_told_of_are_apart():
    module, states = Attention(), torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    actual, _ = tower_attention(module, (states,), {"cu_seq_lens_q": bounds}, "received")
    torch.testing.assert_close(actual, naive(module, states, BLOCKS[:1], "received"), **CLOSE)


@pytest.mark.parametrize("at_once", [1, 50, 2**20])
def test_attention_received_does_not_depend_on_how_many_queries_are_taken_at_a_time(at_once):
    module, states = Attention(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    query, key, _ = module.heads(states)
    actual = received_attention(query, key, 0.7, added(BLOCKS)[:, None], at_once)
    torch.testing.assert_close(actual, naive(module, states, BLOCKS, "received"), **CLOSE)


def test_half_precision_is_read_in_single_precision():
    module = Attention().half()
    query, key, _ = module.heads(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).half())
    for read in (received_attention, cls_attention):
        assert read(query, key, 0.7, as_keys(REAL)).dtype == torch.float32
        torch.testing.assert_close(read(query, key, 0.7), read(query.float(), key.float(), 0.7))


class Elsewhere(Attention):
    """Attends by itself."""

    def forward(self, states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        query, key, value = self.heads(states)
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2)


def test_what_cannot_be_read_is_refused_by_name():
    states = torch.randn(2, 6, 8)
    with pytest.raises(UnsupportedModelError, match="Elsewhere attends by none of transformers' attention functions"):
        tower_attention(Elsewhere(), (states,), {}, "received")
    with pytest.raises(UnsupportedInputError, match="under a mask of type object"):
        tower_attention(Attention(), (states,), {"attention_mask": object()}, "received")


def test_a_copied_module_is_read_with_its_own_weights():
    module, states = Attention(), torch.randn(2, 6, 8)
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.k_proj.weight)
    even, _ = tower_attention(twin, (states,), {}, "received")
    torch.testing.assert_close(even, torch.ones(2, 6), **CLOSE)
    assert not torch.allclose(tower_attention(module, (states,), {}, "received")[0], even, atol=1e-2)


# From patches to tokens


def test_patches_of_a_token_are_those_of_the_picture_in_the_docstring():
    rows = torch.arange(8.0)
    blocks = torch.tensor([0.0, 1, 4, 5, 2, 3, 6, 7])
    for values, order in ((rows, "rows"), (blocks, "blocks"), (blocks, "windows")):
        assert fold(values, (1, 2, 4), 2, order).tolist() == [[2.5, 4.5]]


def test_rows_are_cut_at_the_end_where_they_are_padded_and_at_the_front_where_not():
    attention = torch.arange(10.0).view(2, 5)
    grids = [(1, 2, 2), (1, 1, 3)]
    assert [values.tolist() for values, _ in by_picture(attention, grids, True)] == [[0, 1, 2, 3], [5, 6, 7]]
    assert [values.tolist() for values, _ in by_picture(attention, grids, False)] == [[1, 2, 3, 4], [7, 8, 9]]


def test_frames_are_rows_of_their_own_or_one_after_another():
    row = torch.arange(8.0).view(1, 8)
    assert [grid for _, grid in by_picture(row, [(2, 2, 2)], True)] == [(2, 2, 2)]
    assert [grid for _, grid in by_picture(row.view(2, 4), [(2, 2, 2)], True)] == [(1, 2, 2)] * 2


def test_frames_are_pooled_where_there_are_as_many_tokens_as_in_one():
    picture = torch.arange(8.0), (2, 2, 2)
    assert token_values([picture], [2], "rows", 2, LOWEST).tolist() == [1.5, 5.5]
    assert token_values([picture], [2], "rows", 1, LOWEST).tolist() == [3.5]


def test_tokens_in_front_of_the_patches_get_the_lowest_score():
    pictures = [(torch.tensor([1.0, 2.0]), (1, 1, 2)), (torch.tensor([3.0, 4.0]), (1, 1, 2))]
    assert token_values(pictures, [1, 1], "rows", 6, LOWEST).tolist() == [-torch.inf, 1, 2, -torch.inf, 3, 4]
    assert token_values([], [], "rows", 0, LOWEST).tolist() == []


def test_what_has_channels_is_folded_as_one_number_is():
    grid, channels = (2, 4, 6), torch.randn(48, 2, 3)
    for order in ("rows", "blocks"):
        whole = token_values([(channels, grid)], [2], order, 12, 0.0)
        each = [token_values([(one, grid)], [2], order, 12, 0.0) for one in channels.flatten(1).T]
        assert torch.equal(whole.flatten(1), torch.stack(each, 1))
    assert token_values([(channels, grid)], [1], "rows", 49, 0.0)[0].eq(0).all()


def test_counts_that_do_not_fit_are_refused():
    picture = torch.arange(6.0), (1, 2, 3)
    with pytest.raises(UnsupportedInputError, match="squares of 2 x 2 patches don't fill an image of 2 x 3"):
        token_values([picture], [2], "rows", 1, LOWEST)
    with pytest.raises(UnsupportedInputError, match="returns 5 tokens for 6 places of patches"):
        token_values([picture], [1], "rows", 5, LOWEST)
    for attention in (torch.zeros(2, 4), torch.zeros(1, 3)):
        with pytest.raises(UnsupportedInputError, match=r"patches of the grids \[\(1, 2, 2\)\] were expected"):
            by_picture(attention, [(1, 2, 2)], False)
