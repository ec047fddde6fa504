"""Modules of vltok.nn under what PyTorch does to modules: second and forward derivatives, vmap, compilers, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vltok.methods.adl.diversification import score_diversification_loss
from vltok.nn import AttentionDiversificationLoss, TokenAwareAveragePooling, TokenPackerProjector

STEP = 1e-5  # of central differences, in float64


class Scores(nn.Module):
    """The loss of queries and keys, which lie in one tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * score_diversification_loss(*x.chunk(2, dim=-1), scale=1.0, threshold=1.2)


class OneSided(nn.Module):
    """The loss of maps with a row in which nothing exceeds the threshold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.softmax(-1)
        even = torch.full_like(x[:, :, :1], 1 / x.shape[-1])
        return 100 * AttentionDiversificationLoss(1.2)(torch.cat([x[:, :, 1:], even + 0 * x[:, :, :1]], dim=2))


class Several(nn.Module):
    """The loss of two maps, of which the second is a part of the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.softmax(-1)
        return 100 * AttentionDiversificationLoss(1.2)([x, x[:, :1]])


@dataclass(frozen=True)
class Row:
    """A module, the shape of one sample, and the grid that it is called with besides."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    grid: tuple[int, int] | None = None
    is_loss: bool = False  # a scalar, whose batch may not be empty
    is_linear: bool = False

    def module(self, training: bool = False) -> nn.Module:
        """With weights at which every part counts."""
        torch.manual_seed(0)
        module = self.make().double().train(training)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape) * (0.3 if weight.dim() < 2 else weight[0].numel() ** -0.5))
        return module

    def inputs(self, batch: int, seed: int = 1, grow: bool = False) -> tuple:
        """Of so many samples; with `grow` on a grid that is one row higher."""
        rng, shape, grid = torch.Generator().manual_seed(seed), self.shape, self.grid
        if grow:
            shape, grid = (shape[0] + grid[1], *shape[1:]), (grid[0] + 1, grid[1])
        x = torch.randn(batch, *shape, generator=rng, dtype=torch.float64)
        return (x,) if grid is None else (x, grid)


def packer(scale: int, levels: int, heads: int = 4) -> Callable[[], nn.Module]:
    return lambda: TokenPackerProjector((2 * scale, scale), 2, 3, scale, levels, embed_dim=8, num_heads=heads)


ROWS = [
    *(Row(f"packer-s{s}", packer(s, n), (2 * s * s, 2 * n)) for s, n in ((1, 2), (2, 4), (3, 1), (4, 3))),
    Row("packer-many-heads", packer(2, 1, 8), (8, 2)),
    Row("pooling", lambda: TokenAwareAveragePooling(5, 4), (20, 5), (4, 5)),
    Row("pooling-prefix", lambda: TokenAwareAveragePooling(5, 3, num_prefix_tokens=2), (22, 5), (4, 5)),
    Row("pooling-maps", lambda: TokenAwareAveragePooling(5, 2, temperature=0.5), (5, 3, 4)),
    Row("pooling-one-scale", lambda: TokenAwareAveragePooling(5, 1), (16, 5), is_linear=True),
    Row("diversification", Several, (3, 7, 7), is_loss=True),
    Row("diversification-even", OneSided, (3, 7, 7), is_loss=True),
    Row("diversification-scores", Scores, (3, 7, 8), is_loss=True),
]
EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def along(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """The derivative in one direction, from differences."""
    return (function(x + STEP * way) - function(x - STEP * way)) / (2 * STEP)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("training", [False, True])
@EVERY
def test_gradients_of_gradients_are_those_of_differences(row, training):
    module = row.module(training)
    x, *grid = row.inputs(2)
    own = [x, *module.parameters()]
    ways = [torch.randn(each.shape, dtype=torch.float64) for each in own]

    def penalty() -> torch.Tensor:
        total = module(own[0], *grid).sum()  # whose gradient to the module is a constant
        grads = torch.autograd.grad(total, own, create_graph=True, allow_unused=True)
        return sum(grad.square().sum() for grad in grads if grad is not None)

    own[0].requires_grad_()
    found = torch.autograd.grad(penalty(), own, allow_unused=True)
    slope = sum((g * way).sum() for g, way in zip(found, ways, strict=True) if g is not None)
    ends = []
    for step in (STEP, -STEP):
        with torch.no_grad():
            for each, way in zip(own, ways, strict=True):
                each.add_(way, alpha=step)
        ends.append(penalty().detach())
        with torch.no_grad():
            for each, way in zip(own, ways, strict=True):
                each.sub_(way, alpha=step)
    close(slope.detach(), (ends[0] - ends[1]) / (2 * STEP))
    assert (slope.abs() > 1e-3) != row.is_linear


@EVERY
def test_forward_derivatives_are_those_of_differences(row):
    module = row.module()
    x, *grid = row.inputs(2)
    way = row.inputs(2, seed=2)[0]
    expected = along(lambda z: module(z, *grid), x, way).detach()
    close(torch.func.jvp(lambda z: module(z, *grid), (x,), (way,))[1].detach(), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, way)
        close(torch.autograd.forward_ad.unpack_dual(module(dual, *grid)).tangent.detach(), expected)


@EVERY
def test_second_derivatives_by_torch_func_are_those_of_differences(row):
    module = row.module()
    x, *grid = row.inputs(2)
    way = row.inputs(2, seed=2)[0]
    slope = torch.func.grad(lambda z: module(z, *grid).square().sum())
    _, found = torch.func.jvp(slope, (x,), (way,))
    close(found.detach(), along(slope, x, way).detach())


@EVERY
def test_vmap_is_one_call_after_another(row):
    module = row.module()
    x, *grid = row.inputs(6)
    stacked = x.unflatten(0, (3, 2))
    found = torch.func.vmap(lambda z: module(z, *grid))(stacked)
    close(found, torch.stack([module(each, *grid) for each in stacked]))
    jacobians = [way(lambda z: module(z, *grid))(x[:1]) for way in (torch.func.jacfwd, torch.func.jacrev)]
    close(*jacobians)


@pytest.mark.full  # compiling takes long
@pytest.mark.parametrize("training", [False, True])
@EVERY
def test_a_compiled_module_takes_any_batch_and_grid_and_trains(row, training):
    torch._dynamo.reset()
    module = row.module(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    calls = [row.inputs(batch) for batch in (2, 3, 1)]
    calls += [row.inputs(4, grow=True)] if row.grid else []
    for x, *grid in calls:
        if not training:
            with torch.no_grad():
                close(compiled(x, *grid), module(x, *grid))
            continue
        own = [x.requires_grad_(), *module.parameters()]
        outputs = [compiled(x, *grid), module(x, *grid)]
        close(*outputs)
        pairs = [torch.autograd.grad(out.square().sum(), own, allow_unused=True) for out in outputs]
        for mine, theirs in zip(*pairs, strict=True):
            if theirs is not None:
                close(mine, theirs)


@EVERY
def test_an_exported_module_takes_any_batch(row):
    module = row.module()
    batch = torch.export.Dim("batch", min=1, max=64)
    free = ({0: batch}, *((None, None) for _ in row.inputs(3)[1:]))
    exported = torch.export.export(module, row.inputs(3), dynamic_shapes=free).module()
    for size in (1, 3, 7):
        inputs = row.inputs(size)
        close(exported(*inputs), module(*inputs))


@EVERY
def test_no_samples_give_none(row):
    module = row.module()
    x, *grid = row.inputs(0)
    x.requires_grad_()
    if row.is_loss:
        with pytest.raises(ValueError, match=r"got \(0, 3, 7"):
            module(x, *grid)
        return
    out = module(x, *grid)
    assert out.shape == (0, *module(*row.inputs(1)).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("needs_grad", [False, True])
@EVERY
def test_on_the_meta_device_shapes_come_out(row, needs_grad):
    module = row.module()
    x, *grid = row.inputs(2)
    expected = module(x, *grid)
    found = module.to("meta")(x.to("meta").requires_grad_(needs_grad), *grid)
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")
    if needs_grad:
        found.sum().backward()
