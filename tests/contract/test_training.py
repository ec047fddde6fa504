"""Training with labels, for every method on every family."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import batch, plain, positions, promise, same_picks, single
from checkpointing import recompute
from oracle import decoder_of, placeholders
from prompts import CACHE, turn
from reference import assert_close
from rows import few, only_pruning


def taught(pair, inputs) -> torch.Tensor:
    """Labels, (B, T): all that there is, or the last word of each row where a method has to read the others."""
    ids = inputs["input_ids"]
    if not pair.needs_question:
        return ids
    last = torch.arange(ids.shape[1]) == (inputs["attention_mask"].cumsum(1).argmax(1, keepdim=True))
    return ids.masked_fill(~last, -100)


def test_labels_give_the_loss_of_the_kept_sequence_and_gradients(pair, model):
    inputs = batch(pair, "right")
    trained = copy.deepcopy(model).train()
    labels = taught(pair, inputs).masked_fill(placeholders(model, inputs) | ~inputs["attention_mask"].bool(), -100)
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
    learning = learners(pair, model)
    missing = [
        name for name, p in trained.named_parameters() if name in learning and (p.grad is None or not p.grad.any())
    ]
    assert learning and not missing
    assert not new or added
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in added)


def learners(pair, model) -> set[str]:
    """Weights that learn without the method; those of a tower or projector only where the method leaves these alone.

    Tokens that the model adds to a picture, such as newlines, may all be left out.
    """
    untouched, inputs = copy.deepcopy(model).train(), plain(pair.family)
    untouched(**inputs, labels=inputs["input_ids"]).loss.backward()
    names = {name for name, p in untouched.named_parameters() if p.grad is not None and p.grad.any()}
    decoder = {id(p) for p in decoder_of(untouched, pair.family).parameters()}
    tokens = {id(p) for p in untouched.model.parameters(recurse=False)}
    names -= {name for name, p in untouched.named_parameters() if id(p) in tokens}
    names -= {name for name in names if name.rpartition(".")[2].startswith("image_")}  # in a tower
    first = {name for name in names if "patch_embed" in name}
    own = {name for name, p in untouched.named_parameters() if id(p) in decoder}
    return names if pair.prunes else names & (own | first)


def test_gradient_checkpointing_gives_the_same_gradients(pair, model):
    promise("checkpointing", checkpointed_gradients_are_the_same, pair, model)


def checkpointed_gradients_are_the_same(pair, model):
    inputs = batch(pair, "right")
    grads = []
    for reentrant in (None, False, True):
        trained = copy.deepcopy(model).train()
        if reentrant is not None:
            recompute(trained, reentrant)
            trained.enable_input_require_grads()
        torch.manual_seed(0)  # some towers leave out layers at random
        with pair.apply(trained):
            trained(**inputs, labels=taught(pair, inputs), use_cache=False).loss.backward()
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
        own = positions(model, inputs).view(*pair.axes, 1, -1)  # some would count from 1
        begun = model(**inputs, position_ids=own, use_cache=True)
        decided = handle.report(file=None)
        for answer, asked in (([20, 21], 0), ([30, 31, 32, 33], 0), ([22, 23, 24, 25, 26], 2)):
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            labels = ids.clone()
            labels[:, :length] = -100
            labels[:, length + 1 : length + 1 + asked] = -100  # a second question between two answers
            whole = {**inputs, **turn(inputs, inputs["input_ids"], torch.tensor([answer]), pair.family.word_type)}
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
            assert_close(trained.logits[:, length:], rest)


@few
def test_two_checkpointed_forwards_are_recomputed_in_another_thread(pair, model):
    """As autograd does on accelerators; and the backward passes run in the order of the forwards."""
    promise("checkpointing", two_forwards_are_recomputed, pair, model)


def two_forwards_are_recomputed(pair, model):
    inputs = [single(pair, row) for row in (0, 1)]
    gradients = []
    for reentrant in (None, False, True):
        trained = copy.deepcopy(model).train()
        if reentrant is not None:
            recompute(trained, reentrant)
            trained.enable_input_require_grads()
        torch.manual_seed(0)
        with pair.apply(trained):
            losses = [trained(**each, labels=taught(pair, each), use_cache=False).loss for each in inputs]
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
        for layer in decoder_of(trained, pair.family).layers:
            layer.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
        trained(**batch(pair), use_cache=False)
        gc.collect()
        assert alive and all(reference() is None for reference in alive)
