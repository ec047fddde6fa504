"""The Triton kernel of greedy picks against the loop of torch: on a GPU if there is one, and in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so that the interpreter needs a process of its own. One test starts
it; there the tests of `TestKernel` run on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import HAS_TRITON, IS_INTERPRETED, check_interpreted, needs_triton, outside
from safetensors.torch import load_file

from vltok.kernels import greedy as module
from vltok.methods.pruning.divprune import max_min_order
from vltok.methods.pruning.todre import diverse_order

DATA = Path(__file__).parents[1] / "data"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
PIVOTS = {"todre_select_n48_d16": (0, 7, 47), "todre_select_n576_d64": (0, 226, 575)}


@needs_triton
@outside
def test_the_kernel_picks_what_torch_picks_in_the_interpreter():
    check_interpreted(f"{__file__}::TestKernel")


@needs_triton
@outside
@pytest.mark.parametrize(("block", "warps"), [(1, 4), (1024, 4), (module.LONGEST, 16)])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_compiles(scaled, summed, block, warps):
    """The compiler is stricter about types than the interpreter, and needs no GPU to check them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vltok.kernels.greedy_triton import _pick_kernel

    types = {"alike_ptr": "*fp32", "first_ptr": "*i64", "scale_ptr": "*fp32", "picks_ptr": "*i64"}
    types |= {"length": "i32", "num_keep": "i32", "summed": "constexpr", "block": "constexpr"}
    constants = {"summed": summed, "block": block}
    if not scaled:
        types["scale_ptr"], constants["scale_ptr"] = "constexpr", None
    target = GPUTarget("cuda", 80, 32)
    compile(ASTSource(_pick_kernel, types, constants), target=target, options={"num_warps": warps})


@pytest.mark.parametrize(
    ("device", "length", "runs"),
    [("cuda", 16384, True), ("cuda", 16385, False), ("cpu", 9, False), ("mps", 9, False)],
)
def test_the_kernel_is_for_cuda_devices_and_sets_that_fit(device, length, runs, monkeypatch):
    stand_in = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vltok.kernels.greedy_triton", stand_in)
    monkeypatch.setattr("vltok.kernels.greedy_triton", stand_in, raising=False)
    alike = SimpleNamespace(device=torch.device(device), shape=(1, length, length))  # as this machine may lack it
    assert module._twin(alike) is (stand_in if runs else None)


def test_without_triton_the_loop_runs(monkeypatch):
    monkeypatch.delattr("vltok.kernels.greedy_triton", raising=False)
    monkeypatch.delitem(sys.modules, "vltok.kernels.greedy_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert module._twin(SimpleNamespace(device=torch.device("cuda"), shape=(1, 9, 9))) is None


def slow_picks(alike: list[list[float]], first: int, num_keep: int, score: str, scale: list[float]) -> list[int]:
    """The definition in numbers of Python; exact where the numbers are small fractions."""
    picks = [first]
    while len(picks) < num_keep:
        left = [i for i in range(len(alike)) if i not in picks]
        fold = sum if score == "sum" else max
        distance = {i: scale[i] * fold(alike[p][i] - 1 for p in picks) for i in left}
        picks.append(min(left, key=lambda i: (distance[i], i)))
    return picks


def matrices(batch: int, length: int, levels: int, seed: int) -> torch.Tensor:
    """Made-up likeness of few values, so that there are ties, some items being equal, +inf on the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(-levels, levels + 1, (batch, length, length), generator=generator) / 8
    kind = torch.randint(length, (batch, length), generator=generator)
    alike = torch.stack([x[k][:, k] for x, k in zip(kinds, kind, strict=True)])
    alike.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return alike.contiguous()


class TestKernel:
    __test__ = HAS_TRITON and (IS_INTERPRETED or torch.cuda.is_available())

    @pytest.fixture
    def launches(self, monkeypatch) -> list[int]:
        """Let `pick_apart` take the kernel on this device; one entry for each launch, how many tokens it picks."""
        from vltok.kernels import greedy_triton

        seen, right = [], greedy_triton.pick_apart

        def watched(alike, first, num_keep, score, scale):
            seen.append(num_keep)
            return right(alike, first, num_keep, score, scale)

        monkeypatch.setattr(module, "_twin", lambda alike: SimpleNamespace(pick_apart=watched))
        return seen

    @pytest.mark.parametrize("strategy", ["max_sum", "k_center"])
    @pytest.mark.parametrize("name", PIVOTS)
    def test_todre_s_golden_picks(self, name, strategy, launches):
        stored = load_file(DATA / f"{name}.safetensors")
        picks = torch.stack([stored[f"p{i}.{strategy}.indices"] for i in range(3)])
        tokens, pivots = stored["in.x"].float().expand(3, -1, -1).to(DEVICE), torch.tensor(PIVOTS[name]).to(DEVICE)
        assert torch.equal(diverse_order(tokens, picks.shape[1], pivots, strategy).cpu(), picks)
        assert launches == [picks.shape[1]]

    @pytest.mark.parametrize("name", ["divprune_n576_d256", "divprune_n2880_d128"])
    def test_divprune_s_golden_picks(self, name, launches):
        stored = load_file(DATA / f"{name}.safetensors")
        picks = stored["out.indices"]
        assert torch.equal(max_min_order(stored["in.x"].to(DEVICE).unsqueeze(0), len(picks))[0].cpu(), picks)
        assert launches == [len(picks)]

    @pytest.mark.usefixtures("launches")
    def test_divprune_takes_one_token_of_every_group_of_equal_ones(self):
        stored = load_file(DATA / "divprune_duplicates.safetensors")
        picks = max_min_order(stored["in.x"].to(DEVICE).unsqueeze(0), 60)[0].cpu()
        assert len(stored["in.group"][picks[:12]].unique()) == 12
        assert len(picks.unique()) == 60

    @settings(max_examples=500, deadline=None)
    @given(
        batch=st.integers(1, 3),
        length=st.integers(1, 34),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        levels=st.integers(0, 8),
        score=st.sampled_from(["sum", "max"]),
        weighted=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def test_picks_are_those_of_the_definition(self, batch, length, share, levels, score, weighted, seed):
        from vltok.kernels import greedy_triton

        alike, num_keep = matrices(batch, length, levels, seed), max(1, round(length * share))
        generator = torch.Generator().manual_seed(seed + 1)
        first = torch.randint(length, (batch,), generator=generator)
        weights = torch.randint(1, 4, (batch, length), generator=generator) / 2
        scale = weights.to(DEVICE) if weighted else None
        picks = greedy_triton.pick_apart(alike.to(DEVICE), first.to(DEVICE), num_keep, score, scale)
        rows = (weights if weighted else torch.ones(batch, length)).tolist()
        one_by_one = zip(alike.tolist(), first.tolist(), rows, strict=True)
        expected = [slow_picks(x, start, num_keep, score, row) for x, start, row in one_by_one]
        assert picks.dtype == torch.int64 and picks.tolist() == expected
        assert torch.equal(module.follow(module.rows_of(alike), first, num_keep, score, scale), torch.tensor(expected))

    @pytest.mark.parametrize("score", ["sum", "max"])
    @pytest.mark.parametrize("length", [1000, 1024, 1025])
    def test_numbers_of_every_size_are_folded_as_torch_folds_them(self, length, score):
        from vltok.kernels import greedy_triton

        generator = torch.Generator().manual_seed(length)
        alike = torch.randn(2, length, length, generator=generator)
        alike.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        scale = torch.rand(2, length, generator=generator).clamp_min(1e-12)
        alike, scale, first = alike.to(DEVICE), scale.to(DEVICE), torch.tensor([0, length - 1]).to(DEVICE)
        for counts in (None, scale, scale.mT.contiguous().mT):
            expected = module.follow(module.rows_of(alike), first, 60, score, counts)
            assert torch.equal(greedy_triton.pick_apart(alike, first, 60, score, counts), expected)

    @pytest.mark.parametrize("score", ["sum", "max"])
    def test_no_pick_lies_outside_where_numbers_are_none(self, score):
        from vltok.kernels import greedy_triton

        alike = matrices(2, 11, 3, 0).to(DEVICE)
        alike[0, :, 4] = torch.nan
        alike[1] = torch.nan
        first = torch.tensor([2, 3]).to(DEVICE)
        expected = module.follow(module.rows_of(alike), first, 11, score)
        assert torch.equal(greedy_triton.pick_apart(alike, first, 11, score, None), expected)
