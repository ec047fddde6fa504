"""SoftmaxFreeAttention in compiled and exported graphs, its derivatives of other kinds, and with hardly any tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad

from vltok.errors import UnsupportedInputError
from vltok.nn import SoftmaxFreeAttention

NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "norm"])
PARITY = pytest.mark.parametrize("parity", [False, True], ids=["ours", "released"])


def make(spread: float = 2.0, **kwargs) -> SoftmaxFreeAttention:
    """Two heads of 8 channels, landmarks of 2 x 2 cells; `spread` says how far they are from each other."""
    attention = SoftmaxFreeAttention(16, 2, 2, 5, **kwargs)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
        attention.attn.Qnorm_act[0].weight.add_(1).mul_(spread)
    return attention


def tokens(attention: SoftmaxFreeAttention, grid: tuple[int, int], batch: int = 2, seed: int = 1) -> torch.Tensor:
    count = attention.num_prefix_tokens + grid[0] * grid[1]
    return torch.randn(batch, count, attention.dim, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def step(attention, layer, x: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """The output and all gradients of a training step; `layer` is the attention or what it was compiled to."""
    attention.zero_grad()
    leaf = x.clone().requires_grad_()
    out = layer(leaf, grid)
    out.float().square().mean().backward()
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in attention.parameters())]


def check_steps(attention: SoftmaxFreeAttention, backend: str, sizes, bound: float = 1e-4) -> None:
    torch._dynamo.reset()
    twin = copy.deepcopy(attention)
    fast = torch.compile(twin, fullgraph=True, backend=backend)
    for batch, grid in sizes:
        x = tokens(attention, grid, batch)
        pairs = zip(step(twin, fast, x, grid), step(attention, attention, x, grid), strict=True)
        for number, (found, expected) in enumerate(pairs):
            assert error(found, expected) < bound, f"batch {batch}, grid {grid}, result {number}"


SIZES = ((2, (8, 8)), (3, (8, 8)), (5, (7, 5)), (2, (6, 9)))  # grids that a ratio of 2 divides, or not


@pytest.mark.full  # compiling takes long
@pytest.mark.parametrize(("normalize", "parity"), [(True, False), (False, False), (True, True)])
def test_a_compiled_training_step_takes_other_batches_and_grids(normalize, parity):
    check_steps(make(normalize=normalize, parity=parity, num_prefix_tokens=1), "aot_eager", SIZES)


def test_a_step_compiled_by_inductor_is_the_eager_one_also_on_odd_grids_and_alone():
    """It looks at real strides, where one sample has others than its fake, and orders those of grids unknown to it."""
    check_steps(make(num_prefix_tokens=2), "inductor", ((1, (7, 5)), (2, (6, 8))), 1e-3)


def test_one_graph_serves_all_grids():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    fast, attention = torch.compile(layer := make(), fullgraph=True, backend=count), layer
    with torch.no_grad():
        for batch, grid in ((2, (8, 8)), (3, (8, 8)), (2, (8, 6)), (4, (7, 5)), (3, (6, 5)), (2, (5, 6)), (2, (3, 3))):
            x = tokens(attention, grid, batch)
            torch.testing.assert_close(fast(x, grid), attention(x, grid))
    assert len(graphs) <= 4, "the first sizes, other batches, other grids"


def test_half_precision_compiles():
    attention = make(num_prefix_tokens=1)
    x, grid = tokens(attention, (7, 6)), (7, 6)
    torch._dynamo.reset()
    fast = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert error(fast(x, grid), attention(x, grid)) < 2e-2
    attention.bfloat16()
    assert error(fast(x.bfloat16(), grid), attention(x.bfloat16(), grid)) < 2e-2


@NORMALIZE
@PARITY
def test_it_exports_with_a_free_batch(parity, normalize):
    attention = make(normalize=normalize, parity=parity, num_prefix_tokens=1).eval()
    free = {0: torch.export.Dim("batch", min=1, max=64)}
    graph = torch.export.export(attention, (tokens(attention, (7, 5)), (7, 5)), dynamic_shapes=(free, (None, None)))
    for batch in (1, 5):
        x = tokens(attention, (7, 5), batch)
        torch.testing.assert_close(graph.module()(x, (7, 5)), attention(x, (7, 5)))


# Derivatives of other kinds


@NORMALIZE
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("spread", [2.0, 0.3], ids=["apart", "crowded"])
def test_forward_mode_derivatives_are_those_of_finite_differences(spread, prefix, normalize):
    attention = make(spread, normalize=normalize, num_prefix_tokens=prefix).double()
    x, way = (tokens(attention, (7, 5), seed=seed).double() for seed in (1, 2))

    def f(x: torch.Tensor) -> torch.Tensor:
        return attention(x, (7, 5))

    with torch.no_grad():
        expected = (f(x + 1e-5 * way) - f(x - 1e-5 * way)) / 2e-5
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, way))).tangent
    for found in (torch.func.jvp(f, (x,), (way,))[1], dual):
        assert error(found, expected) < 1e-4


@NORMALIZE
def test_torch_func_gives_the_gradients_of_the_backward_pass_and_of_each_sample(normalize):
    attention = make(normalize=normalize, num_prefix_tokens=1).double()
    x, weights = tokens(attention, (7, 5)).double(), dict(attention.named_parameters())

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attention, weights, (x, (7, 5))).square().sum()

    values = {name: weight.detach() for name, weight in weights.items()}
    found = torch.vmap(torch.func.grad(lambda weights, x: loss(weights, x[None])), in_dims=(None, 0))(values, x)
    for i in range(2):
        expected = torch.autograd.grad(loss(weights, x[i : i + 1]), list(weights.values()))
        for name, gradient in zip(weights, expected, strict=True):
            assert error(found[name][i], gradient) < 1e-9, name
    assert error(torch.vmap(lambda x: attention(x, (7, 5)))(x[None])[0], attention(x, (7, 5))) < 1e-12


def penalty(attention: SoftmaxFreeAttention, x: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(attention(x, (4, 4)).square().sum(), x, create_graph=True)
    return gradient.square().sum()


@NORMALIZE
def test_a_gradient_penalty_has_the_slope_of_finite_differences(normalize):
    attention = make(8.0, normalize=normalize, num_prefix_tokens=1).double()
    x, way = (tokens(attention, (4, 4), seed=seed).double() for seed in (1, 2))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(penalty(attention, leaf), leaf)
    ends = [penalty(attention, (x + h * way).requires_grad_()).item() for h in (1e-5, -1e-5)]
    assert (slope * way).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_a_gradient_penalty_is_refused_where_the_pseudo_inverse_is_cut_off_and_forward_over_reverse_is_right():
    attention = make(0.1, normalize=True).double()
    x, way = (tokens(attention, (4, 4), seed=seed).double() for seed in (1, 2))
    leaf = x.clone().requires_grad_()
    with pytest.raises(UnsupportedInputError, match=r"no second derivatives by a backward pass.*normalize=False"):
        penalty(attention, leaf).backward()

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: attention(x, (4, 4)).square().sum())(x)

    _, found = torch.func.jvp(slope, (x,), (way,))
    assert error(found, (slope(x + 1e-6 * way) - slope(x - 1e-6 * way)) / 2e-6) < 1e-4


# Long prefix tokens


@NORMALIZE
@pytest.mark.parametrize("size", [1, 100, 1000])
@pytest.mark.parametrize("prefix", [1, 3])
def test_long_prefix_tokens_give_what_float64_gives(prefix, size, normalize):
    """Several of them are near to each other, and far from the patches."""
    attention = make(normalize=normalize, num_prefix_tokens=prefix)
    x = tokens(attention, (7, 7))
    x[:, :prefix] = x[:, :1] * size + x[:, :prefix]
    results = []
    for layer, start in ((attention, x), (copy.deepcopy(attention).double(), x.double())):
        leaf = start.clone().requires_grad_()
        out = layer(leaf, (7, 7))
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for found, expected in zip(*results, strict=True):
        for part in (slice(0, prefix), slice(prefix, None)):
            assert error(found[:, part], expected[:, part]) < 1e-3


# Hardly any tokens


@NORMALIZE
@PARITY
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empty_batches_and_meta_tensors_give_shapes(device, parity, normalize):
    attention = make(normalize=normalize, parity=parity, num_prefix_tokens=1).to(device)
    for batch in (0, 2) if device == "meta" else (0,):
        x = tokens(attention, (7, 5), batch).to(device).requires_grad_()
        out = attention(x, (7, 5))
        assert (out.shape, out.device.type) == (x.shape, device)
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert device == "meta" or all(not parameter.grad.any() for parameter in attention.parameters())
