"""Calls that cross each other: threads, calls inside calls, interrupts, recomputation elsewhere, copies, adapters."""

from __future__ import annotations

import copy
import inspect
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from towers import PAIRS, VisionPair, pixels, shared_tower

import vltok
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.families import view

TOLERANCE = 2e-5  # of the largest number, see test_contract_vision.py
# Older peft can't wrap a part that is called with keywords alone, such as the attention of CLIP.
WRAPS_KEYWORD_CALLS = "x" not in inspect.signature(AuxiliaryTrainingWrapper.forward).parameters
ADAPTED = 1e-3  # where weights were merged, in another order of float32 sums


@pytest.fixture(params=PAIRS)
def pair(request) -> VisionPair:
    return PAIRS[request.param]


@pytest.fixture
def model(pair) -> nn.Module:
    """A model of one's own in train mode, where ADL counts too."""
    return copy.deepcopy(shared_tower(pair.tower)).train()


def pictures(pair: VisionPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches; where the tower takes any size their grids differ, and have the same number of patches."""
    if pair.tower.any_size is None:
        return pixels(2), pixels(2).flip(-1)
    return pixels(2, 24, 40), pixels(2, 40, 24)


Outcome = tuple[torch.Tensor, torch.Tensor]


def outcome(pair: VisionPair, model: nn.Module, handle: vltok.Handle, shown: torch.Tensor) -> Outcome:
    """What the model answers, and the loss of that call."""
    return pair.tower.answer(model, shown, **(pair.tower.any_size or {})), handle.loss()


def assert_same(found: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item() + 1e-12)


def places(model: nn.Module) -> list[nn.Module]:
    """Parts of the tower, one behind the other: the patch layer, a block, and what stands first in the last block."""
    vision = view(model).vision
    blocks = vision.family.blocks(vision.host)
    norm = getattr(blocks[2], vision.family.first_norm)
    return [vision.family.patch_layer(vision.host), blocks[1], norm]


@contextmanager
def once(place: nn.Module, action: Callable[[], None]) -> Iterator[None]:
    """Do something the first time that a part has run in this block."""
    left = [action]

    def hook(*_) -> None:
        if left:
            left.pop()()

    handle = place.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_call_inside_a_call_changes_neither(pair, model):
    one, other = pictures(pair)
    with pair.apply(model) as handle:
        expected = [outcome(pair, model, handle, shown) for shown in (one, other)]
        for place in places(model):
            inner = []
            with once(place, lambda inner=inner: inner.append(outcome(pair, model, handle, other))):
                found = outcome(pair, model, handle, one)
            assert_same(found, expected[0])
            assert_same(inner[0], expected[1])


def test_threads_that_pass_each_other_inside_the_tower_keep_their_pictures(pair, model):
    one, other = pictures(pair)
    with pair.apply(model) as handle:
        expected = [outcome(pair, model, handle, shown) for shown in (one, other)]
        for place in places(model):
            overtaking = []

            def overtake(overtaking=overtaking) -> None:
                thread = threading.Thread(target=lambda: overtaking.append(outcome(pair, model, handle, other)))
                thread.start()
                thread.join()

            with once(place, overtake):
                found = outcome(pair, model, handle, one)
            assert_same(found, expected[0])
            assert_same(overtaking[0], expected[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_was_broken_off_leaves_nothing_behind(pair, model, error):
    def stop() -> None:
        raise error("stop")

    one, other = pictures(pair)
    with pair.apply(model) as handle:
        expected = [outcome(pair, model, handle, shown) for shown in (one, other)]
        for place in places(model):
            with pytest.raises(error, match="stop"), once(place, stop):
                outcome(pair, model, handle, one)
            assert_same(outcome(pair, model, handle, other), expected[1])
            assert_same(outcome(pair, model, handle, one), expected[0])


def gradients(pair: VisionPair, model: nn.Module, backward: Callable) -> dict[str, torch.Tensor]:
    """Gradients of a loss of two batches, of which both have passed before either goes back."""
    with pair.apply(model) as handle:
        losses = []
        for shown in pictures(pair):
            answered, loss = outcome(pair, model, handle, shown)
            losses.append(answered.square().sum() * (1 + len(losses)) + 100 * loss)
        backward(losses)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def elsewhere(losses: list[torch.Tensor]) -> None:
    """Go back from all of them, the first one last, in another thread, as is done for other devices."""
    errors = []

    def run() -> None:
        try:
            for loss in reversed(losses):
                loss.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_blocks_are_recomputed_in_another_thread_with_the_pictures_they_had(pair, model, reentrant):
    checkpointed = copy.deepcopy(model)
    is_refused = pair.tower.checkpoint(checkpointed, reentrant) and pair.has(vltok.ADL)
    if is_refused:
        with pytest.raises(UnsupportedInputError, match="use_reentrant=False"):
            gradients(pair, checkpointed, elsewhere)
        return
    expected = gradients(pair, model, lambda losses: sum(losses).backward())
    found = gradients(pair, checkpointed, elsewhere)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-4 * grad.abs().max().item(), msg=name)


def test_a_pickled_model_answers_as_before(pair):
    # A model of its own: transformers' hooks for hidden states can't be pickled, and shared ones have them by now.
    model, stream = pair.tower.model(), io.BytesIO()
    with pair.apply(model), torch.no_grad():
        shown = pictures(pair)
        options = pair.tower.any_size or {}
        expected = [pair.tower.answer(model, each, **options) for each in shown]
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
        for each, answer in zip(shown, expected, strict=True):
            assert torch.equal(pair.tower.answer(twin, each, **options), answer)


# Adapters


def linear_layers(pair: VisionPair, model: nn.Module) -> list[str]:
    """Names of the linear layers of the blocks."""
    vision = view(model).vision
    inside = {part for block in vision.family.blocks(vision.host) for part in block.modules()}
    names = [name for name, part in model.named_modules() if part in inside and isinstance(part, nn.Linear)]
    return [name for name in names if not name.endswith(pair.tower.read_past)]


def adapt(model: nn.Module, **settings) -> nn.Module:
    """Put LoRA on, with weights that matter and are the same each time."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings)).train()
    generator = torch.Generator().manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return adapted


def test_an_adapter_counts_before_the_method_and_after_it_and_merged(pair, model):
    shown, layers = pictures(pair)[0], linear_layers(pair, model)
    early = copy.deepcopy(model)
    if pair.has(vltok.SOFT):
        with pytest.raises(UnsupportedModelError, match=r"no attention module|has no linear layer|has further weights"):
            pair.apply(adapt(early, target_modules=layers))
        with pair.apply(model) as handle:
            plain = outcome(pair, model, handle, shown)
            adapted = adapt(model, target_modules=linear_layers(pair, model))
            late = outcome(pair, model, handle, shown)
            assert not torch.allclose(late[0], plain[0], rtol=1e-2)
            adapted.merge_and_unload()
            assert_same(outcome(pair, model, handle, shown), late, ADAPTED)
        return
    adapted = adapt(early, target_modules=layers)
    first = pair.apply(early)
    second = pair.apply(model)
    plain = outcome(pair, model, second, shown)
    expected = outcome(pair, early, first, shown)
    assert not torch.allclose(plain[0], expected[0], rtol=1e-2)
    assert pair.changes or plain[1] != expected[1]
    late = adapt(model, target_modules=layers)
    assert_same(outcome(pair, model, second, shown), expected)
    for wrapped, handle, bare in ((adapted, first, early), (late, second, model)):
        wrapped.merge_and_unload()
        assert_same(outcome(pair, bare, handle, shown), expected, ADAPTED)
        handle.remove()
        outcome(pair, bare, handle, shown)


def test_parts_that_an_adapter_trains_as_a_whole_go_on_working(pair, model):
    one, other = pictures(pair)
    vision = view(model).vision
    handle = pair.apply(model)
    expected = [outcome(pair, model, handle, shown) for shown in (one, other)]
    names = {part: name for name, part in model.named_modules()}
    norm = getattr(vision.family.blocks(vision.host)[0], vision.family.first_norm)
    saved = [names[part] for part in (vision.family.patch_layer(vision.host), norm)]
    saved += [names[vision.attention_module(1)]] if WRAPS_KEYWORD_CALLS else []
    saved += ["dilation_predictor"] if pair.has(vltok.TAP) else []
    config = LoraConfig(target_modules=[linear_layers(pair, model)[-1]], modules_to_save=saved)
    adapted = get_peft_model(model, config)
    answered, loss = outcome(pair, model, handle, one)
    assert_same((answered, loss), expected[0])
    (answered.square().sum() + 100 * loss).backward()
    copies = {name: p for name, p in adapted.named_parameters() if "modules_to_save" in name}
    assert copies and all(p.grad is not None for p in copies.values())
    with torch.no_grad():
        for weight in copies.values():
            weight.mul_(1.1)
        assert not torch.allclose(outcome(pair, model, handle, other)[0], expected[1][0], rtol=1e-2)
        with adapted.disable_adapter():
            assert_same(outcome(pair, model, handle, other), expected[1])
