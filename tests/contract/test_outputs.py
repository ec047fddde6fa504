"""What a model returns and reports has the form it has without a method, for every method on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import PROMPTS, TOLERANCE, batch, generate, logits
from prompts import CACHE
from rows import only_pruning
from tiny import shared_model

import vltok


def test_eager_and_sdpa_agree(pair, model):
    inputs, eager = batch(pair), shared_model(pair.family, "eager")
    assert model.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    real = inputs["attention_mask"].bool()
    with pair.apply(model), pair.apply(eager):
        torch.testing.assert_close(logits(eager, inputs)[real], logits(model, inputs)[real], **TOLERANCE)


def test_bfloat16_generates_and_keeps_the_budget(pair, model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pair.apply(half) as handle, pair.apply(model) as reference:
        inputs = batch(pair)
        pixels = {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
        assert generate(half, {**inputs, **pixels}).shape == (len(PROMPTS), 5)
        logits(model, inputs)
        assert handle.report(file=None).kept_tokens == reference.report(file=None).kept_tokens


def test_hidden_states_come_back_at_the_length_of_the_prompt(pair, model):
    inputs = batch(pair)
    with pair.apply(model), torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == model.config.get_text_config().num_hidden_layers + 1
    assert all(state.shape[:2] == inputs["input_ids"].shape for state in states)


@only_pruning
def test_report_tells_what_the_cache_holds(pair, model):
    inputs = batch(pair)
    with pair.apply(model) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        report = handle.report(file=None)
    method = pair.method
    keys = [layer.keys for layer in cache.layers]
    assert report.kv_entries == [key.shape[-2] for key in keys]
    assert report.kv_bytes == sum(2 * key.numel() * key.element_size() for key in keys)
    assert report.tokens_per_layer.max(0).values.tolist() == report.kv_entries
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert [sum(row) for row in report.visual_tokens] == placeholders
    for row, kept in zip(report.visual_tokens, report.kept_tokens, strict=True):
        budgets = {"keep_ratio": method.keep_ratio, "num_keep": method.num_keep}
        if budgets == {"keep_ratio": None, "num_keep": None}:
            assert kept == row
        else:
            assert kept == [vltok.tokens.keep_count(n, **budgets) for n in row]
