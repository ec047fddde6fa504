"""ToDRE's stage 2: attention ratios out of indicator values, against golden numbers and a materialised softmax."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from vltok.engine.attention import attention_mass, indicator_values
from vltok.methods.pruning.todre import ToDRE, relevance_ratios

DATA = Path(__file__).parent.parent / "data"
CASES = json.loads((DATA / "todre_alpha.json").read_text())


class State:
    """What the engine shows a rule."""

    def __init__(self, is_visual: torch.Tensor, is_text: torch.Tensor, mass: torch.Tensor) -> None:
        self.is_visual, self.is_text, self.mass = is_visual, is_text, mass
        self.recorded: list[tuple[torch.Tensor, ...]] = []

    def record(self, *values: torch.Tensor) -> None:
        self.recorded.append(values)


def rows(length: int, members: list[int]) -> torch.Tensor:
    found = torch.zeros(1, length, dtype=torch.bool)
    found[0, members] = True
    return found


def mass_of(query, key, columns, **attention) -> torch.Tensor:
    """Run attention on indicator values: query (B, H, S, C), key (B, G, S, C), columns (B, S, 2)."""
    batch, groups, length, width = key.shape
    values = indicator_values(columns, groups, width, query.dtype).view(batch, length, groups, width).transpose(1, 2)
    output = scaled_dot_product_attention(query, key, values, enable_gqa=True, **attention)
    return attention_mass(output.transpose(1, 2).flatten(2), width, columns.shape[-1])


@pytest.mark.parametrize("text", ["text_after", "text_all"])
@pytest.mark.parametrize("case", range(3))
def test_ratios_equal_the_golden_numbers(case, text):
    stored, expected = load_file(DATA / "todre_alpha.safetensors"), CASES[case]
    query, key = (stored[f"c{case}.in.{name}"].unsqueeze(0) for name in ("q", "k"))
    length = query.shape[2]
    is_visual = rows(length, list(range(*expected["visual"])))
    is_text = rows(length, expected["results"][text]["T"])
    columns = torch.stack([is_visual, is_text], -1)
    mass = mass_of(query, key, columns, is_causal=True, scale=expected["scale"])
    alpha_tv, alpha_vt = relevance_ratios(mass, is_visual, is_text)
    torch.testing.assert_close(alpha_tv.item(), expected["results"][text]["alpha_t2v"], rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha_vt.item(), expected["results"][text]["alpha_v2t"], rtol=0, atol=1e-6)


def materialised(query, key, mask, is_visual, is_text) -> tuple[float, float]:
    """The two ratios of one sample by the definition, with the attention map in float64 and loops."""
    heads, length, width = query.shape
    key = key.repeat_interleave(heads // key.shape[0], 0)
    logits = query.double() @ key.double().mT / width**0.5
    attention = logits.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)
    share = {"tv": [0.0, 0.0], "vt": [0.0, 0.0]}
    for i in range(length):
        for name, queries, keys in (("tv", is_text, is_visual), ("vt", is_visual, is_text)):
            if queries[i]:
                share[name][0] += sum(attention[i, j].item() for j in range(length) if keys[j])
                share[name][1] += attention[i].sum().item()
    return tuple(part / whole for part, whole in share.values())


# s: system prompt, v: visual, t: text after the first visual token, ".": padding
PROMPTS = ["ssvvvvttvvtttt", "..svvvvvvttttt", "vvttttvvttt...", "....svvvtttvtt"]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
def test_ratios_equal_a_materialised_softmax_with_grouped_heads_padding_and_images_between_text(heads, groups):
    generator = torch.Generator().manual_seed(heads)
    length, width, batch = len(PROMPTS[0]), 8, len(PROMPTS)
    query = 2 * torch.randn(batch, heads, length, width, generator=generator)
    key = 2 * torch.randn(batch, groups, length, width, generator=generator)
    kind = torch.tensor([[ord(c) for c in prompt] for prompt in PROMPTS])
    is_visual, is_text, real = kind == ord("v"), kind == ord("t"), kind != ord(".")
    mask = torch.ones(length, length, dtype=torch.bool).tril() & real.unsqueeze(1)
    mask |= torch.eye(length, dtype=torch.bool)  # a padding row attends to itself, as in transformers
    mass = mass_of(query, key, torch.stack([is_visual, is_text], -1), attn_mask=mask.unsqueeze(1))
    alpha_tv, alpha_vt = relevance_ratios(mass, is_visual, is_text)
    assert alpha_vt[:1].item() > 0.01  # the case isn't blind to the second ratio
    for i in range(batch):
        expected = materialised(query[i], key[i], mask[i], is_visual[i], is_text[i])
        torch.testing.assert_close((alpha_tv[i].item(), alpha_vt[i].item()), expected, rtol=0, atol=1e-6)


def test_rows_outside_are_not_looked_at():
    is_visual, is_text = rows(6, [1, 2]), rows(6, [3, 4])
    mass = torch.full((1, 6, 2), torch.nan)
    mass[0, 1:5] = torch.tensor([[0.9, 0.2], [0.9, 0.4], [0.5, 0.1], [0.3, 0.1]])
    alpha_tv, alpha_vt = relevance_ratios(mass, is_visual, is_text)
    torch.testing.assert_close((alpha_tv, alpha_vt), (torch.tensor([0.4]), torch.tensor([0.3])))


def test_swapping_the_columns_is_seen():
    is_visual, is_text = rows(4, [0, 1]), rows(4, [2, 3])
    mass = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.2, 0.8], [0.2, 0.8]]])
    assert [a.item() for a in relevance_ratios(mass, is_visual, is_text)] == pytest.approx([0.2, 0.0])
    assert [a.item() for a in relevance_ratios(mass.flip(-1), is_visual, is_text)] == pytest.approx([0.8, 1.0])


def test_a_sample_without_visual_or_text_rows_is_never_dropped():
    none, some = rows(4, []), rows(4, [1, 2])
    mass = torch.zeros(1, 4, 2)
    assert [a.item() for a in relevance_ratios(mass, none, some)] == [0.0, 1.0]
    assert [a.item() for a in relevance_ratios(mass, some, none)] == [1.0, 0.0]
    for is_visual, is_text in ((none, some), (some, none), (none, none)):
        assert ToDRE(stages=(2,), tau=1.0).keep(State(is_visual, is_text, mass)).all()


def test_the_decision_needs_both_ratios_below_tau_and_is_made_per_sample():
    method = ToDRE(keep_ratio=0.1, tau=0.10)
    alpha_tv = torch.tensor([0.05, 0.05, 0.20, 0.20, 0.10, torch.nan])
    alpha_vt = torch.tensor([0.05, 0.20, 0.05, 0.20, 0.00, 0.0])
    assert method.decide(alpha_tv, alpha_vt).tolist() == [True, False, False, False, False, False]
    is_visual, is_text = rows(3, [0, 1]).expand(2, -1), rows(3, [2]).expand(2, -1)
    mass = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.09, 0.9]], [[1.0, 0.0], [1.0, 0.0], [0.11, 0.9]]])
    state = State(is_visual, is_text, mass)
    assert method.keep(state).tolist() == [[False, False, True], [True, True, True]]
    ((alpha_tv, alpha_vt, drop),) = state.recorded
    torch.testing.assert_close(alpha_tv, torch.tensor([0.09, 0.11]))
    assert alpha_vt.tolist() == [0.0, 0.0]
    assert drop.tolist() == [True, False]


def test_half_precision_attention_is_close_enough_to_decide():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 64, 16, generator=generator) for _ in range(2))
    is_visual, is_text = rows(64, list(range(8, 40))), rows(64, list(range(40, 64)))
    columns = torch.stack([is_visual, is_text], -1)
    exact = relevance_ratios(mass_of(query, key, columns, is_causal=True), is_visual, is_text)
    half = relevance_ratios(mass_of(query.bfloat16(), key.bfloat16(), columns, is_causal=True), is_visual, is_text)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=2e-3)


def test_more_groups_than_channels_are_refused():
    with pytest.raises(ValueError, match="3 groups"):
        indicator_values(torch.ones(1, 4, 3, dtype=torch.bool), 2, 2, torch.float32)
