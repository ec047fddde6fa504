"""The benchmark of SOFT's kernels compares functions that compute the same, and prints a table of each."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from eval import soft_kernels


@pytest.mark.parametrize(
    ("functions", "tensors"),
    [
        (soft_kernels.mixes, soft_kernels.mix_tensors(2, 30, 5, 4)),
        (soft_kernels.convolutions, soft_kernels.convolution_tensors(2, 6, 9, 5)),
    ],
)
def test_what_is_compared_computes_the_same(functions, tensors):
    leaves = [x.double().requires_grad_() for x in tensors]
    results = [(out := function(*leaves), *torch.autograd.grad(out.sum(), leaves)) for function in functions().values()]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_it_prints_a_table_of_each():
    app = soft_kernels.typer.Typer()
    app.command()(soft_kernels.main)
    done = CliRunner().invoke(app, ["--quick", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert "mix: ms" in done.output and "convolution: ms" in done.output
