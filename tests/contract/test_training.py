"""Training with labels, for every method on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import batch

import vltok


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
            trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            trained.enable_input_require_grads()
        with pair.apply(trained):
            trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    for checkpointed in grads[1:]:
        assert checkpointed.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(checkpointed[name], grad, rtol=1e-3, atol=1e-5)
