"""The projector's benchmark compares equal things, counts products and bytes right, and would notice a difference."""

from __future__ import annotations

import json

import pytest
import torch
import torch.utils.checkpoint
import torch.utils.flop_counter
from torch import nn

from eval import projector

TINY = projector.Sizes(grid=4, dim=8, hidden=16, levels=2, embed=16, heads=2)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    return projector.build(TINY, scale=2)


def test_both_formulations_agree_in_outputs_and_gradients(pair):
    projector.check(*pair, "cpu")


@pytest.mark.parametrize("name", ["v_proj_1.2.bias", "clip_attn.in_proj_weight", "mlp.0.weight"])
def test_a_difference_in_one_weight_is_noticed(pair, name):
    pair[0].get_parameter(name).data.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"differ by .* in the output"):
        projector.check(*pair, "cpu")


def test_products_are_those_that_both_formulations_make(pair):
    features = torch.randn(3, TINY.grid**2, TINY.levels * TINY.dim)
    made = []
    for module in pair[1].modules():
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            module.register_forward_hook(
                lambda m, args, out: made.append((args[0].shape[:-1].numel(), *m.weight.shape))
            )
    projector.forward(pair[1], features)
    patches, tokens = 3 * 16, 3 * 4
    attention = [(tokens, 16, 16), (patches, 16, 16), (patches, 16, 16), (tokens, 16, 16)]
    released = projector.products(TINY, 3, 2, released=True)
    assert sorted((p.rows, p.width_out, p.width_in) for p in released) == sorted(made + attention)
    own = projector.products(TINY, 3, 2, released=False)
    assert sum(p.rows for p in released) - sum(p.rows for p in own) == 2 * (patches - tokens)


@pytest.mark.parametrize("released", [True, False])
def test_bare_products_multiply_as_often_as_they_say(released):
    layers = projector.products(TINY, 2, 2, released)
    bare = projector.BareProducts(layers, torch.float32, "cpu")
    for run, times in ((bare.forward, lambda p: 1), (bare.train, lambda p: 3 if p.input_grad else 2)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            run()
        expected = sum(2 * p.rows * p.width_in * p.width_out * times(p) for p in layers)
        assert counter.get_total_flops() == expected


class Squares(nn.Module):
    """Takes as much memory as is written here: x * w, of which the backward pass needs nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


def test_peaks_are_counted_to_the_byte():
    module, x = Squares(), torch.ones(1000)
    forward = projector.partial(projector.forward, module, x)
    backward = projector.partial(projector.train, module, x, cotangent=torch.ones(1000))
    assert projector.peak_bytes(forward, module, "cpu", accumulating=False) == 4000  # the output
    assert projector.peak_bytes(backward, module, "cpu", accumulating=False) == 4000  # the gradient doesn't count
    assert projector.peak_bytes(backward, module, "cpu", accumulating=True) == 8000  # what is added to it does


def test_memory_that_lives_only_inside_counts_and_is_the_same_every_time(pair):
    def temporary() -> None:
        torch.empty(500).sigmoid()

    peaks = {projector.peak_bytes(temporary, pair[0], "cpu", accumulating=False) for _ in range(3)}
    assert peaks == {4000}


def test_recomputed_tensors_are_not_counted_as_held():
    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = x.sigmoid()
        return x

    x = torch.ones(1000, requires_grad=True)
    holding = projector.peak_bytes(lambda: deep(deep(x)), nn.Identity(), "cpu", accumulating=False)
    checkpoint = projector.partial(
        torch.utils.checkpoint.checkpoint, deep, use_reentrant=False, preserve_rng_state=False
    )
    lean = projector.peak_bytes(lambda: checkpoint(checkpoint(x)), nn.Identity(), "cpu", accumulating=False)
    assert holding == 16 * 4000
    assert lean <= 4 * 4000


def test_the_verdict_says_which_goals_were_met():
    times, memory = {"released": 1.0, "own": 1.2, "plain": 0.9}, {"fresh": 0.5, "accumulating": 0.7}
    result = {"batch": 8, "time": times, "memory": memory}
    assert ["NOT MET" in line for line in projector.goals([result])] == [False, True, False, False, True]
    assert len(projector.goals([result | {"batch": 1}])) == 3


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(projector, "OFFICIAL", TINY)
    path = tmp_path / "out.json"
    projector.main(["--scales", "2", "--batches", "1,8", "--rounds", "2", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [(r["dtype"], r["batch"], r["what"]) for r in results] == [
        (d, b, w) for d in ("float32", "bfloat16") for b in (1, 8) for w in projector.PASSES
    ]
    assert all(value > 0 for r in results for value in (*r["time"].values(), *r["memory"].values()))
    assert "time / released products <= 1.10" in capsys.readouterr().out


def test_a_region_that_does_not_divide_the_grid_is_refused(capsys):
    with pytest.raises(SystemExit):
        projector.main(["--scales", "5"])
    assert "must divide the grid of 24, got [5]" in capsys.readouterr().err
