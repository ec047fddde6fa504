"""Training with labels, for every method on every family."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import TOLERANCE, batch, positions, same_picks, single
from checkpointing import recompute
from prompts import CACHE, turn
from rows import few, only_pruning


def test_labels_give_the_loss_of_the_kept_sequence_and_gradients(pair, model):
    inputs = batch(pair, "right")
    trained = copy.deepcopy(model).train()
    placeholder = inputs["input_ids"] == model.config.image_token_id
    labels = inputs["input_ids"].masked_fill(placeholder | ~inputs["attention_mask"].bool(), -100)
    with pair.apply(trained) as handle:
        output = trained(**inputs, labels=labels)
        output.loss.backward()
        new = set(handle.added_modules)
        hosts = [host for host in trained.modules() if new & set(host.children())]
        read = [host for host in hosts if any(p.grad is not None for p in host.parameters())]  # LLaVA: not block -1
        added = [p for host in read for module in new & set(host.children()) for p in module.parameters()]
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    # Each labelled token is predicted from the last kept token before it, which is where the logits stand.
    scores, target = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(scores[target != -100], target[target != -100])
    torch.testing.assert_close(output.loss, expected)
    missing = [
        name for name, p in trained.named_parameters() if "layers" in name and "language" in name and p.grad is None
    ]
    assert not missing
    assert not new or added
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in added)
    tower = [p.grad for name, p in trained.named_parameters() if "patch_embed" in name and p.grad is not None]
    assert tower and all(grad.abs().sum() > 0 for grad in tower)


def test_gradient_checkpointing_gives_the_same_gradients(pair, model):
    inputs = batch(pair, "right")
    grads = []
    for reentrant in (None, False, True):
        trained = copy.deepcopy(model).train()
        if reentrant is not None:
            recompute(trained, reentrant)
            trained.enable_input_require_grads()
        with pair.apply(trained):
            trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    assert_alike(grads)


def assert_alike(gradients: list[dict[str, torch.Tensor]]) -> None:
    """Compare gradients by name with the first ones."""
    for others in gradients[1:]:
        assert others.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


@only_pruning
def test_answers_do_not_sway_the_decision(pair, model):
    """Answers of any text and number: what stands before the first of them decides, as in generate()."""
    inputs = dict(single(pair, 0))
    length = inputs["input_ids"].shape[1]
    with pair.apply(model) as handle, torch.no_grad():
        begun = model(**inputs, use_cache=True)
        decided = handle.report(file=None)
        for answer, asked in (([20, 21], 0), ([30, 31, 32, 33], 0), ([22, 23, 24, 25, 26], 2)):
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            labels = ids.clone()
            labels[:, :length] = -100
            labels[:, length + 1 : length + 1 + asked] = -100  # a second question between two answers
            whole = {**inputs, **turn(inputs, inputs["input_ids"], torch.tensor([answer]))}
            trained = model(**whole, labels=labels, use_cache=False)
            report = handle.report(file=None)
            assert same_picks(report.keep_indices, decided.keep_indices)
            for mine, right in zip(report.relevance[0], decided.relevance[0], strict=True):
                assert (mine.layer, mine.dropped) == (right.layer, right.dropped)
                assert (mine.alpha_tv, mine.alpha_vt) == pytest.approx((right.alpha_tv, right.alpha_vt), abs=1e-5)
            at = positions(model, inputs).reshape(-1).max() + 1 + torch.arange(len(answer))
            rest = model(
                input_ids=torch.tensor([answer]),
                position_ids=at.expand(*pair.axes, 1, -1),
                **{CACHE: copy.deepcopy(begun[CACHE])},
            ).logits
            torch.testing.assert_close(trained.logits[:, length:], rest, **TOLERANCE)


@few
def test_two_checkpointed_forwards_are_recomputed_in_another_thread(pair, model):
    """As autograd does on accelerators; and the backward passes run in the order of the forwards."""
    inputs = [single(pair, row) for row in (0, 1)]
    gradients = []
    for reentrant in (None, False, True):
        trained = copy.deepcopy(model).train()
        if reentrant is not None:
            recompute(trained, reentrant)
            trained.enable_input_require_grads()
        with pair.apply(trained):
            losses = [trained(**each, labels=each["input_ids"], use_cache=False).loss for each in inputs]
            with ThreadPoolExecutor(1) as pool:
                for loss in losses:
                    pool.submit(loss.backward).result()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    assert_alike(gradients)


@few
def test_a_call_without_backward_is_freed(pair, model):
    """Nobody keeps the graph of a call that was never used."""
    trained = copy.deepcopy(model).train()
    alive = []
    with pair.apply(trained):
        for layer in trained.model.language_model.layers:
            layer.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
        trained(**batch(pair), use_cache=False)
        gc.collect()
        assert alive and all(reference() is None for reference in alive)
