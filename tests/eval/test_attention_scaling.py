"""The scaling benchmark compares equal things, fits exponents, finds the crossover and says whether goals are met."""

from __future__ import annotations

import json
import math

import pytest
import torch

from eval import attention_scaling as scaling
from vltok.methods.soft.inverse import released_inverse


def result(tokens: int, what: str = "forward", **times: float) -> scaling.Result:
    times = {"sdpa": 1.0, scaling.CONSTANT: 1.0, scaling.GROWING: 1.0, "released": 1.0} | times
    to = {
        f"to_{other}": {name: times[other] / value for name, value in times.items()} for other in ("sdpa", "released")
    }
    return {"tokens": tokens, "what": what, "milliseconds": times, "mebibytes": dict(times), **to}


@pytest.mark.parametrize("normalize", [False, True])
def test_soft_and_the_released_formulation_agree(normalize):
    scaling.check(8, 2, normalize, "cpu")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spoil", ["inverse", "kernel"])
def test_a_difference_is_noticed(spoil, normalize, monkeypatch):
    if spoil == "kernel":
        kernel = scaling.whole_kernel
        monkeypatch.setattr(scaling, "whole_kernel", lambda a, b: kernel(a, b * 1.01))
    else:
        monkeypatch.setattr(scaling, "STEPS", 2)
    with pytest.raises(RuntimeError, match="differ by"):
        scaling.check(8, 2, normalize, "cpu")


def test_kernels_do_not_vanish_in_what_is_compared():
    layer = scaling.build(32, 64, 2, normalize=True)[scaling.GROWING]
    seen = []
    layer.attn.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
    layer(torch.randn(1, 1024, 64), (32, 32))
    (module, (_, value, grid), output) = seen[0]
    convolved = module._convolve(value, grid)
    assert (output - convolved).norm() > 0.1 * convolved.norm()


def test_the_plain_inverse_is_the_released_one():
    x = torch.randn(3, 2, 9, 4)
    kernel = scaling.whole_kernel(x, x)
    for normalize, ridge in ((False, 0.01), (True, 0.0)):
        torch.testing.assert_close(scaling.newton(kernel, normalize), released_inverse(kernel, 20, ridge))


@pytest.mark.parametrize(("side", "ratio"), [(14, 2), (56, 8), (112, 16), (32, 4), (128, 16)])
def test_the_number_of_landmarks_is_constant(side, ratio):
    assert scaling.constant_ratio(side) == ratio
    assert (side // ratio) ** 2 in (49, 64)


def test_exponents_are_those_of_power_laws_from_1024_tokens_on():
    points = [(n, 3 * n**1.5) for n in (1024, 3136, 16384)]
    assert scaling.exponent([(196, 1e9), *points]) == pytest.approx(1.5)
    assert math.isnan(scaling.exponent(points[:1]))


def test_the_crossover_is_where_it_stays_faster():
    results = [result(196, SOFT=0.5), result(1024, SOFT=2), result(3136, SOFT=0.5), result(4096, SOFT=0.9)]
    assert scaling.crossover(results, "forward", "SOFT") == 3136
    assert scaling.crossover([result(196, SOFT=2)], "forward", "SOFT") is None
    assert scaling.crossover([], "forward", "SOFT") is None


def test_goals_met_and_missed_are_told_apart():
    good = [result(n, what, SOFT=n / 1e4, sdpa=n**2 / 1e6) for n in (1024, 4096, 16384) for what in scaling.PASSES]
    good.append(result(3136, "forward+backward", SOFT=0.3, sdpa=9.8, released=2.1))
    assert all(line.endswith(": met") for line in scaling.goals(good))
    bad = [result(n, what, SOFT=n**1.2, sdpa=n) for n in (1024, 4096, 16384) for what in scaling.PASSES]
    bad.append(result(12544, "forward+backward", SOFT=1e5, sdpa=1e4, released=1.9))
    assert all(line.endswith("NOT MET") for line in scaling.goals(bad))
    assert len(scaling.goals(bad)) == len(scaling.goals(good)) == 7


def test_it_measures_draws_and_writes_json(tmp_path, capsys):
    path, image = tmp_path / "scaling.json", tmp_path / "scaling.png"
    small = ["--sides", "8,32,40", "--dim", "8", "--rounds", "1"]
    scaling.main([*small, "--json", str(path), "--plot", str(image)])
    assert "exponents of SOFT" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert {(r["tokens"], r["what"]) for r in content["results"]} == {
        (n, what) for n in (64, 1024, 1600) for what in scaling.PASSES
    }
    for r in content["results"]:
        assert set(r["milliseconds"]) == {"sdpa", scaling.CONSTANT, scaling.GROWING, "released"}
        assert min(r["mebibytes"].values()) > 0
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("functions", "tensors"),
    [
        (scaling.mixes, scaling.mix_tensors(2, 30, 5, 4)),
        (scaling.convolutions, scaling.convolution_tensors(2, 6, 9, 5)),
    ],
)
def test_kernels_that_are_compared_compute_the_same(functions, tensors):
    leaves = [x.double().requires_grad_() for x in tensors]
    results = [(out := function(*leaves), *torch.autograd.grad(out.sum(), leaves)) for function in functions().values()]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_kernels_have_a_table_each(capsys):
    scaling.main(["--kernels", "--quick", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "mix: ms" in out and "convolution: ms" in out
    assert out.count("1.00x") >= 2  # ours beside itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dim", "10", "--heads", "3"), "divide the width 10"),
        (("--sides", "4"), "at least 8"),
        (("--sides", "a"), "whole numbers"),
    ],
)
def test_wrong_arguments_are_explained(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        scaling.main(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err
