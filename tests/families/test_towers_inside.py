"""Vision towers inside vision-language models: what SOFT, TAP and ADL do there, and what refuses them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrix import TRAINED
from tiny import ALL, TinyFamily, picture, shared_model
from torch import nn
from towers import draw
from unchanged import unchanged
from zoo import gemma, glm, late, qwen, tiles

import vltok
from vltok.errors import UnsupportedModelError
from vltok.families import view

FAMILIES = {family.key: family for family in [*ALL, *tiles.ROWS, *gemma.ROWS, *glm.ROWS, *late.ROWS, *qwen.ROWS]}
CHANGING = {name: TRAINED[name] for name in ("soft", "tap")}
TAKEN = [(key, name) for key, family in FAMILIES.items() for name in CHANGING if name in family.tower]
LEFT = [(key, name) for key, family in FAMILIES.items() for name in CHANGING if name not in family.tower]
# Of the largest logit: float32 sums in another order, from the tower to the decoder. Measured: 6e-6 at most.
TOLERANCE = 5e-5


def inputs(family: TinyFamily, sizes: list[tuple[int, int]]) -> Any:
    shown = [picture(seed, size) for seed, size in enumerate(sizes)]
    return family.inputs([f"w{n} <image> w5" for n in range(len(sizes))], shown)


def tower_calls(model: nn.Module, given: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each call of the tower's last block returns."""
    vision, seen = view(model).vision, []
    last = vision.family.blocks(vision.host)[-1]
    hook = last.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        return model(**given).logits, [each if torch.is_tensor(each) else each[0] for each in seen]
    finally:
        hook.remove()


@pytest.mark.parametrize(("key", "name"), TAKEN)
def test_a_tower_inside_a_model_answers_as_it_does_alone(key, name):
    """The method on the whole model, and put on a copy of the tower by itself, which gets what the model gives it."""
    family = FAMILIES[key]
    model, method = shared_model(family), CHANGING[name](family)
    given = inputs(family, [family.size, family.other_size])
    tower = view(model).family.tower(view(model).host)
    alone, seen = copy.deepcopy(tower), []
    plain, _ = tower_calls(model, given)
    with unchanged(model):
        torch.manual_seed(0)
        with draw(vltok.apply(model, method)):
            listen = tower.register_forward_pre_hook(lambda module, *call: seen.append(call), with_kwargs=True)
            logits, states = tower_calls(model, given)
            listen.remove()
    assert seen and (logits - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.manual_seed(0)
    found = []
    blocks = view(alone).family.blocks(view(alone).host)
    blocks[-1].register_forward_hook(
        lambda module, args, output: found.append(output if torch.is_tensor(output) else output[0])
    )
    with draw(vltok.apply(alone, method)):
        for args, options in seen:
            alone(*args, **options)
    assert len(found) == len(states)
    for one, other in zip(found, states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("key", "name"), TAKEN)
def test_prompts_of_a_batch_answer_as_they_do_alone(key, name):
    family = FAMILIES[key]
    model = shared_model(family)
    sizes = [family.size, family.other_size]
    shown = [picture(seed, size) for seed, size in enumerate(sizes)]
    with draw(vltok.apply(model, CHANGING[name](family))):
        together = model(**family.inputs(["w1 <image> w5", "w2 <image> w5"], shown)).logits[:, -1]
        for row, words in enumerate(("w1", "w2")):
            own = model(**family.inputs([f"{words} <image> w5"], shown[row : row + 1])).logits[0, -1]
            torch.testing.assert_close(together[row], own, rtol=0, atol=TOLERANCE * own.abs().max().item())


@torch.enable_grad()
@pytest.mark.parametrize("key", dict(TAKEN))
def test_a_tower_inside_a_model_has_a_loss_that_trains_it_where_its_scores_show(key):
    family = FAMILIES[key]
    model = copy.deepcopy(shared_model(family)).train()
    given = inputs(family, [family.size, family.other_size])
    try:
        handle = vltok.apply(model, vltok.ADL(threshold=1.2))
    except UnsupportedModelError as error:
        assert "by rotary positions" in str(error)
        return
    with handle:
        model(**given)
        loss = handle.loss()
        loss.backward()
        assert 0 < loss <= 1
        trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("q_proj" in name or "qkv" in name for name in trained)


@pytest.mark.parametrize(("key", "name"), LEFT)
def test_other_towers_say_why_not_and_are_left_alone(key, name):
    family = FAMILIES[key]
    model = shared_model(family)
    words = "is not one whose blocks vltok knows|has further weights|by rotary positions|pictures of several sizes"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=words):
        vltok.apply(model, CHANGING[name](family))
