"""Blocks that are recomputed in a backward pass, or reached, when other pictures have passed since."""

from __future__ import annotations

import copy

import pytest
import torch
from towers import TOWERS, draw, pixels, shared_tower

import vltok
from vltok.errors import UnsupportedInputError

SOFT = vltok.SOFT(ratio=2)


def accumulate(name: str, schedule: list[tuple[int, ...]], checkpoint: bool | str) -> dict[str, torch.Tensor]:
    """Gradients of a copy: a (height, width) of the schedule is a forward, () takes all backward, (0,) looks on."""
    tower = TOWERS[name]
    model = copy.deepcopy(shared_tower(tower)).train()
    if checkpoint:
        tower.checkpoint(model, checkpoint == "reentrant")
    losses = []
    with torch.enable_grad(), draw(vltok.apply(model, SOFT)):
        for size in schedule:
            if not size:
                sum(losses).backward()
                losses.clear()
            elif size == (0,):
                with torch.no_grad():
                    tower.answer(model, pixels(1, 40, 24), **tower.any_size)
                tower.answer(model.eval(), pixels(1), **tower.any_size)
                model.train()
            else:
                losses.append(tower.answer(model, pixels(2, *size), **tower.any_size).square().sum())
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


CHECKPOINTS = [("clip", "reentrant"), ("clip", "plain"), ("timm-vit", "plain")]


@pytest.mark.parametrize(("name", "checkpoint"), CHECKPOINTS)
@pytest.mark.parametrize(
    "schedule",
    [
        [(24, 40), (), (40, 24), ()],
        [(24, 40), (32, 32), ()],
        [(24, 40), (40, 24), ()],
        [(24, 40), (32, 32), (24, 40), ()],
        [(24, 40), (0,), ()],
    ],
    ids=["the same count in turns", "two sizes", "turned", "three passes", "evaluation between"],
)
def test_recomputed_blocks_are_told_the_grid_they_had(name, checkpoint, schedule):
    expected = accumulate(name, schedule, False)
    found = accumulate(name, schedule, checkpoint)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=key)


@pytest.mark.parametrize(("name", "checkpoint"), [("clip", "plain"), ("timm-vit", "plain")])
def test_grids_of_copied_tokens_are_told_by_their_number_or_refused(name, checkpoint):
    def accumulate_from_copies(*schedule) -> dict[str, torch.Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
            return accumulate(name, [*schedule, ()], checkpoint)

    expected = accumulate(name, [(24, 40), (32, 32), ()], False)
    for key, grad in accumulate_from_copies((24, 40), (32, 32)).items():
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-5 * expected[key].abs().max().item(), msg=key)
    both = r"grids \((3, 5|5, 3)\) and \((3, 5|5, 3)\) have passed through this vision tower"
    with pytest.raises(UnsupportedInputError, match=f"{both}, and nothing tells .* call backward\\(\\)"):
        accumulate_from_copies((24, 40), (40, 24))


def test_segments_of_several_blocks_are_recomputed_with_the_grids_they_had():
    def gradients(every: int) -> dict[str, torch.Tensor]:
        from timm.models._manipulate import checkpoint_seq

        tower = copy.deepcopy(shared_tower(TOWERS["timm-vit"])).train()
        run = tower.blocks.forward
        tower.blocks.forward = (lambda x: checkpoint_seq(list(tower.blocks), x, every=every)) if every else run
        with torch.enable_grad(), draw(vltok.apply(tower, SOFT)):
            losses = [tower(pixels(2, *size)).square().sum() for size in ((24, 40), (40, 24), (32, 32))]
            (losses[0] + 2 * losses[1] + 3 * losses[2]).backward()
        return {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}

    expected = gradients(0)
    for every in (1, 2, 3):
        for key, grad in gradients(every).items():
            torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-4 * expected[key].abs().max().item())


@pytest.mark.parametrize("method", [SOFT, vltok.TAP()], ids=["soft", "tap"])
def test_compiled_blocks_in_a_checkpoint_are_told_the_grid_or_refuse(method):
    def gradients(compiled: bool, *sizes: tuple[int, int]) -> list[torch.Tensor]:
        torch.compiler.reset()
        model = copy.deepcopy(shared_tower(TOWERS["timm-vit"])).train()
        with torch.enable_grad(), draw(vltok.apply(model, method)):
            if compiled:
                model.set_grad_checkpointing()
                for block in model.blocks:
                    block.compile(backend="eager")
            sum(model(pixels(2, *size)).square().sum() for size in sizes).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for found, right in zip(gradients(True, (32, 32)), gradients(False, (32, 32)), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4 * right.abs().max().item())
    with pytest.raises(UnsupportedInputError, match="have passed through this vision tower, and nothing tells"):
        gradients(True, (24, 40), (40, 24))


def test_what_passes_through_a_copy_does_not_count():
    tower = TOWERS["timm-vit"]
    model = copy.deepcopy(shared_tower(tower)).train()
    model.set_grad_checkpointing()
    with torch.enable_grad(), vltok.apply(model, SOFT):
        twin = copy.deepcopy(model)
        loss = model(pixels(1, 24, 40)).sum()
        twin(pixels(1, 40, 24))
        loss.backward()


@pytest.mark.parametrize("method", [SOFT, vltok.TAP()], ids=["soft", "tap"])
@torch.no_grad()
def test_a_call_that_stops_early_inside_another_leaves_that_one_its_grid(method):
    model, wide, high = shared_tower(TOWERS["timm-vit"]), pixels(1, 24, 40), pixels(1, 40, 24)
    with draw(vltok.apply(model, method)):
        expected, left = model(high), [wide]

        def look_ahead(*_) -> None:
            if left:
                model.forward_intermediates(left.pop(), indices=[0], stop_early=True, intermediates_only=True)

        hook = model.patch_embed.proj.register_forward_hook(look_ahead)
        try:
            assert torch.equal(model(high), expected) and not left
        finally:
            hook.remove()
