"""Samples packed in one row, without padding and mask, stay apart, for every method on every family."""

from __future__ import annotations

import copy

import torch
from calls import ALONE, PROMPTS, pictures, positions, promise, single
from oracle import decoder_of, placeholders
from prompts import TOKENS
from reference import assert_close
from rows import dropping_too

import vltok


def packed(pair, model) -> dict:
    """The three prompts in one row: positions start again with each, on every axis the model has."""
    singles = [single(pair, row) for row in range(len(PROMPTS))]
    inputs = dict(pair.inputs([" ".join(PROMPTS)], pictures(pair.family)))
    inputs.pop("attention_mask")
    for name in TOKENS:
        if name in inputs:
            inputs[name] = torch.cat([each[name] for each in singles], dim=1)
    own = [positions(model, each) for each in singles]
    if pair.axes:  # transformers wants the text's own count in front, by which it tells samples apart
        own = [torch.cat([torch.arange(p.shape[-1]).expand(1, 1, -1), p]) for p in own]
    return inputs | {"position_ids": torch.cat(own, dim=-1)}


@dropping_too
def test_each_sample_is_answered_as_alone(pair, model):
    promise("packing", samples_are_answered_as_alone, pair, model)


def samples_are_answered_as_alone(pair, model):
    inputs = packed(pair, model)
    lengths = [single(pair, row)["input_ids"].shape[1] for row in range(len(PROMPTS))]
    with pair.apply(model) as handle, torch.no_grad():
        row = model(**inputs, use_cache=False).logits[0]
        report = handle.report(file=None) if pair.prunes else None
        kept = []
        for number, own in enumerate(row.split(lengths)):
            alone = model(**single(pair, number), use_cache=False).logits[0]
            assert_close(own, alone)
            if pair.prunes and number in ALONE:
                kept += handle.report(file=None).kept_tokens[0]
        assert not pair.prunes or report.kept_tokens == [kept]


@dropping_too
def test_a_full_budget_trains_on_the_same_loss_with_the_same_gradients(pair, model):
    """For methods that bring weights: the packed row's loss is the mean over its samples."""
    promise("packing", packed_samples_train_as_alone, pair, model)


def packed_samples_train_as_alone(pair, model):
    inputs = packed(pair, model)
    labels = inputs["input_ids"].masked_fill(placeholders(model, inputs), -100)
    starts = [sum(single(pair, i)["input_ids"].shape[1] for i in range(row)) for row in range(len(PROMPTS))]
    labels[0, starts] = -100  # nobody foretells the next sample
    trained = copy.deepcopy(model)
    # Norms of batches would tell the samples' batches apart, and some towers leave out layers at random.
    decoder_of(trained, pair.family).train(pair.prunes)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trained.zero_grad()
        loss = trained(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}

    if pair.prunes:
        expected = step()
        with vltok.apply(trained, vltok.StrideTokens(keep_ratio=1.0)):
            loss, gradients = step()
        torch.testing.assert_close(loss, expected[0])
        assert gradients.keys() == expected[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-5)
    with pair.apply(trained):
        loss, _ = step()
        total = count = 0
        for row in range(len(PROMPTS)):
            each = single(pair, row)
            target = labels[:, starts[row] : starts[row] + each["input_ids"].shape[1]]
            number = int((target[:, 1:] != -100).sum())
            total += trained(**each, labels=target, use_cache=False).loss.detach() * number
            count += number
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)
