"""What `apply` promises about putting methods on and taking them off, for every method on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import batch, fingerprint, generate, logits, plain
from rows import only_pruning, refused

import vltok
from vltok.errors import EditConflictError, UnsupportedModelError


def test_remove_restores_the_model_bit_for_bit(pair, model):
    inputs = plain(pair.family)
    before = generate(model, inputs), logits(model, inputs)  # first, as transformers adds hooks of its own lazily
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mark = fingerprint(model)
    handle = pair.apply(model)
    if pair.method.training_free:
        assert list(model.state_dict()) == list(state), "a training-free method must not add weights"
    generate(model, batch(pair))
    handle.remove()
    handle.remove()
    assert fingerprint(model) == mark
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(generate(model, inputs), before[0])
    assert torch.equal(logits(model, inputs), before[1])


@only_pruning
def test_pruning_changes_the_answer_and_shortens_the_sequence(pair, model):
    inputs = batch(pair)
    before = logits(model, inputs)
    with pair.apply(model) as handle:
        after = logits(model, inputs)
        report = handle.report(file=None)
    assert before.shape == after.shape
    real = inputs["attention_mask"].bool()
    assert not torch.allclose(before[real], after[real], atol=1e-3)
    assert (report.tokens_per_layer[:, -1] < real.sum(1))[:2].all()


def test_handle_is_a_context_manager_that_detaches_on_an_exception(pair, model):
    mark = fingerprint(model)
    with pytest.raises(KeyError), pair.apply(model) as handle:
        raise KeyError
    assert not handle.is_attached
    assert fingerprint(model) == mark


def test_a_failure_half_way_leaves_the_model_as_it_was(pair, model):
    class Broken(vltok.Method):
        def attach(self, view, edits, run):
            edits.set_attribute(model, "stray", 1)
            raise RuntimeError("half-way")

    mark = fingerprint(model)
    with pytest.raises(RuntimeError, match="half-way"):
        vltok.apply(model, [pair.method, Broken()], processor=pair.family.processor())
    assert fingerprint(model) == mark


def test_a_second_handle_of_its_kind_is_refused_and_changes_nothing(pair, model):
    with pair.apply(model):
        mark = fingerprint(model)
        with pytest.raises(
            (ValueError, EditConflictError), match=r"already (pruned|condensed|softmax-free|has)|tokens are merged"
        ):
            pair.apply(model)
        assert fingerprint(model) == mark


def test_a_deepcopy_runs_on_its_own_weights(pair, model):
    inputs = batch(pair)
    original = copy.deepcopy(model)
    handle = pair.apply(original)
    expected = logits(original, inputs)
    twin = copy.deepcopy(original)
    assert torch.equal(logits(twin, inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    changed = logits(twin, inputs)
    assert torch.equal(logits(original, inputs), expected)
    handle.remove()
    fresh = copy.deepcopy(original)
    with pair.apply(fresh):
        fresh.load_state_dict(twin.state_dict())
        assert torch.equal(logits(fresh, inputs), changed)
    assert torch.equal(logits(twin, inputs), changed), "removing the original's handle must not reach its copy"


def another(model, family) -> vltok.Handle:
    """A method with other settings than any of the matrix."""
    return vltok.apply(model, vltok.StrideTokens(num_keep=2))


def test_two_models_with_different_settings_coexist(pair, model):
    inputs = batch(pair)
    other = copy.deepcopy(model)
    with pair.apply(model):
        expected = logits(model, inputs)
    with pair.apply(model), another(other, pair.family):
        strided = logits(other, plain(pair.family))
        assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(other, plain(pair.family)), strided)


def test_methods_are_frozen_hashable_and_printable(pair):
    method = pair.method
    assert hash(method) == hash(copy.deepcopy(method))
    with pytest.raises(AttributeError):
        method.anything = 1.0
    assert repr(method).startswith(type(method).__name__)


REASONS = (
    "families that can: llava|choose a method that needs none|not one whose blocks vltok knows|has further weights"
    "|is built otherwise|families whose tokens can: llava, vipllava"
)


@refused
def test_a_family_that_has_no_place_for_a_method_says_so_and_is_left_alone(pair, model):
    mark = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=REASONS):
        pair.apply(model)
    assert fingerprint(model) == mark
