"""Pictures of several sizes in one call of a tower: padded, or in one row. Each is pooled and counted as if alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from towers import PATCH, TOWERS, draw, patches, pixels, shared_tower

import vltok
from vltok.engine.tower_layout import Place, SideBySide, layout_at
from vltok.errors import UnsupportedInputError
from vltok.families import view

SIZES = [(16, 40), (24, 32), (16, 40)]  # 2 x 5, 3 x 4 and 2 x 5 patches of 8 pixels
GRIDS = [(height // PATCH, width // PATCH) for height, width in SIZES]
Mixed = tuple[dict[str, Any], list[tuple[int, list[int]]]]  # what to call a tower with; row and columns of each picture


def shown() -> list[torch.Tensor]:
    return [pixels(3, height, width)[n] for n, (height, width) in enumerate(SIZES)]


def canvas() -> torch.Tensor:
    """The pictures, padded to 24 x 40."""
    return torch.stack([F.pad(own, (0, 40 - own.shape[2], 0, 24 - own.shape[1]), value=1.0) for own in shown()])


def in_rows() -> Mixed:
    """Patches in rows, padded to 13."""
    each = [patches(own[None], 13 - math.prod(grid)) for own, grid in zip(shown(), GRIDS, strict=True)]
    given = {name: torch.cat([own[name] for own in each]) for name in each[0]}
    return given, [(row, list(range(height * width))) for row, (height, width) in enumerate(GRIDS)]


def framed() -> Mixed:
    """On a canvas of 3 x 5 patches."""
    mask = torch.zeros(3, 3, 5, dtype=torch.bool)
    for row, (height, width) in enumerate(GRIDS):
        mask[row, :height, :width] = True
    return {"pixel_values": canvas(), "patch_attention_mask": mask}, [
        (row, own.flatten().nonzero().flatten().tolist()) for row, own in enumerate(mask)
    ]


def in_one_row() -> Mixed:
    return {"pixel_values": canvas(), "image_sizes": SIZES}, [
        (0, list(range(10))),
        (0, list(range(10, 22))),
        (0, list(range(22, 32))),
    ]


MIXED: dict[str, Callable[[], Mixed]] = {
    "siglip2": in_rows,
    "idefics2-padded": framed,
    "idefics3": framed,
    "smolvlm-padded": framed,
    "pixtral": in_one_row,
}
every = pytest.mark.parametrize("name", MIXED)


def alone(name: str, model: nn.Module, own: torch.Tensor) -> torch.Tensor:
    """The tokens of one picture, (1, H * W, C)."""
    inputs = TOWERS[name].bare or TOWERS[name].inputs or (lambda given: {"pixel_values": given})
    return model(**inputs(own[None]))[0]


@every
@pytest.mark.parametrize("method", [None, vltok.TAP(num_scales=3)], ids=["plain", "tap"])
def test_each_picture_answers_as_it_does_alone(name, method):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    given, places = MIXED[name]()
    if method is not None:
        draw(vltok.apply(model, method))
    together = model(**given)[0]
    for own, (row, columns) in zip(shown(), places, strict=True):
        expected = alone(name, model, own)[0]
        torch.testing.assert_close(together[row, columns], expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def pooled(pooling: nn.Module, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The formula for one picture, (H * W, C): means over 3 x 3 patches at each scale, weighted patch by patch."""
    maps = tokens.mT.unflatten(1, grid)[None]
    weights = (pooling.proj(maps) / pooling.temperature).softmax(1)
    mixed = weights[:, :1] * maps
    for scale in range(1, pooling.num_scales):
        near = F.unfold(maps, 3, dilation=scale, padding=scale).view(1, maps.shape[1], 9, *grid).mean(2)
        mixed = mixed + weights[:, scale : scale + 1] * near
    return mixed[0].flatten(1).mT


@every
def test_every_block_pools_each_picture_on_its_own_grid_and_leaves_padding(name):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    given, places = MIXED[name]()
    vision, entered, normed = view(model).vision, [], []
    with draw(vltok.apply(model, vltok.TAP(num_scales=3))) as handle:
        for block in vision.family.blocks(vision.host):
            block.register_forward_pre_hook(
                lambda module, args, options: entered.append(args[0] if args else options["hidden_states"]),
                with_kwargs=True,
            )
            norm = getattr(block, vision.family.first_norm)
            norm.register_forward_hook(lambda module, args, output: normed.append(args[0]))
        model(**given)
        added = handle.added_modules
    assert len(entered) == len(normed) == 3
    for module, before, after in zip(added, entered, normed, strict=True):
        expected = before.clone()
        for (row, columns), grid in zip(places, GRIDS, strict=True):
            expected[row, columns] = pooled(module, before[row, columns], grid)
        assert not torch.allclose(expected, before, atol=0.1)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@every
@torch.enable_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_the_mean_over_the_pictures_and_trains_alike(name, attention):
    given, _ = MIXED[name]()
    losses, grads = [], []
    for together in (True, False):
        model = copy.deepcopy(shared_tower(TOWERS[name], attention)).train()
        with vltok.apply(model, vltok.ADL(threshold=1.2)) as handle:
            if together:
                model(**given)
                loss = handle.loss()
            else:
                parts = []
                for own in shown():
                    alone(name, model, own)
                    parts.append(handle.loss())
                loss = sum(parts) / 3
        loss.backward()
        losses.append(loss)
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert losses[0] > 0.05
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert len(grads[0]) > 20
    for key, grad in grads[0].items():
        atol = 1e-4 * grad.abs().max().item() + 1e-8
        torch.testing.assert_close(grad, grads[1][key], rtol=0, atol=atol, msg=key)


@every
@torch.enable_grad()
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_pool_the_pictures_they_had(name, reentrant):
    """After other pictures have passed."""
    grads, tower = [], TOWERS[name]
    for checkpointing in (False, True):
        model = copy.deepcopy(shared_tower(tower)).train()
        if checkpointing:
            tower.checkpoint(model, reentrant)
        given, _ = MIXED[name]()
        given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
        with draw(vltok.apply(model, vltok.TAP(num_scales=3))):
            loss = model(**given)[0].square().sum()
            tower.answer(model, pixels(2))
            loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=key)


@torch.enable_grad()
def test_a_block_alone_knows_no_pictures():
    model = copy.deepcopy(shared_tower(TOWERS["siglip2"])).train()
    with vltok.apply(model, vltok.ADL()):
        refused = pytest.raises(UnsupportedInputError, match="nothing tells which images they are of")
        with refused:
            model.encoder.layers[0](torch.randn(1, 5, 32), None)


def test_a_layout_says_where_pictures_are():
    places = [Place(0, 0, 2, (1, 2)), Place(0, 2, 2, (1, 2)), Place(1, 0, 2, (2, 2))]  # of the worked example
    wide, square = layout_at((2, 4), places).groups
    assert (wide.grid, square.grid) == ((1, 2), (2, 2))
    assert (wide.rows.tolist(), wide.columns.tolist()) == ([[0], [0]], [[0, 1], [2, 3]])
    assert (square.rows.tolist(), square.columns.tolist()) == ([[1]], [[0, 1, 2, 3]])
    padded = layout_at((1, 6), [Place(0, 0, 3, (2, 2))]).groups  # a row of patches begins every third column
    assert padded[0].columns.tolist() == [[0, 1, 3, 4]]
    assert layout_at((2, 4), [Place(0, 0, 4, (1, 4)), Place(1, 0, 4, (1, 4))]) == (1, 4)
    layout = layout_at((2, 4), [Place(0, 0, 4, (1, 4)), Place(1, 0, 1, (0, 1))])  # the second row has none
    assert isinstance(layout, SideBySide)
    tokens = torch.arange(8.0).view(2, 4, 1)
    assert layout.changed(tokens, lambda own, grid: -own).flatten().tolist() == [0, -1, -2, -3, 4, 5, 6, 7]
