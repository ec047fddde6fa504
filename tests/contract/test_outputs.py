"""What a model returns and reports has the form it has without a method, for every method on every family."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from calls import PROMPTS, batch, generate, logits, pixels, plain, promise, single
from oracle import decoder_of, placeholders
from prompts import CACHE
from reference import assert_close
from rows import only_pruning
from tiny import WINDOW, shared_model
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

import vltok
from vltok.errors import UnsupportedInputError


def test_eager_and_sdpa_agree(pair, model):
    inputs, eager = batch(pair), shared_model(pair.family, "eager")
    if model.config._attn_implementation == "eager":
        pytest.skip("has eager attention alone")
    assert model.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    real = inputs["attention_mask"].bool()
    with pair.apply(model), pair.apply(eager):
        assert_close(logits(eager, inputs)[real], logits(model, inputs)[real], 1e-4)


def test_bfloat16_generates_and_keeps_the_budget(pair, model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pair.apply(half) as handle, pair.apply(model) as reference:
        inputs = batch(pair)
        given = {name: value.to(torch.bfloat16) for name, value in pixels(inputs).items()}
        assert generate(half, {**inputs, **given}).shape == (len(PROMPTS), 5)
        logits(model, inputs)
        assert handle.report(file=None).kept_tokens == reference.report(file=None).kept_tokens


def test_hidden_states_come_back_at_the_length_of_the_prompt(pair, model):
    promise("plain hidden states", hidden_states_have_the_length_of_the_prompt, pair, model)


def hidden_states_have_the_length_of_the_prompt(pair, model):
    inputs = batch(pair)
    with pair.apply(model), torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(decoder_of(model, pair.family).layers) + 1
    assert all(state.shape[:2] == inputs["input_ids"].shape for state in states)


@only_pruning
def test_hidden_states_have_the_shapes_they_have_unpruned(pair, model):
    """With gradients, too, where the last one may be what the decoder returns, or something before it."""
    inputs = batch(pair)
    expected = [state.shape for state in model(**inputs, output_hidden_states=True).hidden_states]
    with pair.apply(model):
        assert [state.shape for state in model(**inputs, output_hidden_states=True).hidden_states] == expected


HELD = ("keys", "values", "idx_keys")  # what layers of a cache keep of tokens


@only_pruning
def test_report_tells_what_the_cache_holds(pair, model):
    inputs = batch(pair)
    with pair.apply(model) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        report = handle.report(file=None)
    held = [index for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    kept = [getattr(layer, name, None) for layer in cache.layers for name in HELD]
    kept = [each for each in kept if each is not None]
    assert report.kv_entries == [cache.layers[index].keys.shape[-2] for index in held]
    assert report.kv_bytes == sum(each.numel() * each.element_size() for each in kept)
    most = report.tokens_per_layer.max(0).values[held].tolist()
    if pair.family.windowed:  # a window's cache holds one token less than the window
        assert all(entries in (tokens, WINDOW - 1) for entries, tokens in zip(report.kv_entries, most, strict=True))
    else:
        assert report.kv_entries == most
    assert [sum(row) for row in report.visual_tokens] == placeholders(model, inputs).sum(1).tolist()
    for row, kept in zip(report.visual_tokens, report.kept_tokens, strict=True):
        assert kept == [pair.entering(n) for n in row]


def test_attention_maps_come_back_at_the_length_of_the_prompt(pair):
    """Zero columns for what is gone; the rows of tokens that stay sum to one in every layer."""
    model, inputs = shared_model(pair.family, "eager"), batch(pair)
    real = inputs["attention_mask"].bool()
    visual = placeholders(model, inputs)
    with pair.apply(model) as handle, torch.no_grad():
        try:
            output = model(**inputs, output_attentions=True, output_hidden_states=True)
        except UnsupportedInputError as error:  # not every version of transformers asks the tower, too
            assert pair.tower_refuses_maps and "attention maps are not to be had" in str(error)
            return
        report = handle.report(file=None)
    length = real.shape[1]
    layers = decoder_of(model, pair.family).layers
    attending = [number for number, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    for number, attention in zip(attending, output.attentions, strict=True):
        assert attention.shape[-2:] == (length, length)
        for index in range(len(real)):
            own = attention[index]
            text = real[index] & ~visual[index]
            torch.testing.assert_close(own[:, text].sum(-1), torch.ones(own.shape[0], int(text.sum())))
            seen = own[:, text].sum((0, 1)) > 0
            assert not (seen & ~real[index]).any()
            if pair.prunes:
                assert int(seen.sum()) <= int(report.tokens_per_layer[index, number])


def test_hidden_states_lead_to_the_gradients_they_have_unpruned(pair):
    """With every token kept the gradients are the unpruned model's, those of attention maps too."""
    model = copy.deepcopy(shared_model(pair.family, "eager"))
    inputs, one = batch(pair), single(pair, 0)
    weights = torch.randn(model.get_output_embeddings().out_features, generator=torch.Generator().manual_seed(0))

    def gradients(inputs, *names: str) -> list[torch.Tensor]:
        options = {f"output_{name}": True for name in names}
        output = model(**inputs, **options, use_cache=False)
        parts = [part for name in names for part in output[name]]
        for part in parts:
            part.retain_grad()
        (output.logits[inputs["attention_mask"].bool()] @ weights).sum().backward()
        assert all(part.grad is not None for part in parts)
        return [part.grad for part in parts]

    if pair.family.changes_last:
        pytest.skip("gradients go past the last hidden state, which is no output of the decoder")
    if pair.prunes:
        cases = [(inputs, "hidden_states"), (one, "hidden_states", "attentions")]
        expected = [gradients(*case) for case in cases]
        with vltok.apply(model, vltok.StrideTokens(keep_ratio=1.0)):
            for case, right in zip(cases, expected, strict=True):
                first = int(pair.family.feeds_layers)  # what goes past the layers doesn't pass the first state
                for mine, theirs in zip(gradients(*case)[first:], right[first:], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    with pair.apply(model):
        text = inputs["attention_mask"].bool() & ~placeholders(model, inputs)
        assert all(grad[text].abs().sum() > 0 for grad in gradients(inputs, "hidden_states"))


@only_pruning
def test_a_budget_is_an_upper_limit(pair, model):
    inputs = batch(pair)
    stage_2 = {"stages": (1,), "relevance": False} if hasattr(pair.method, "stages") else {}
    most = {"ratios": (1.0,) * 3} if hasattr(pair.method, "ratios") else {"num_keep": 100_000, "keep_ratio": None}
    method = replace(pair.method, **most, **stage_2)
    expected, real = logits(model, inputs), inputs["attention_mask"].bool()
    with vltok.apply(model, method) as handle:
        assert_close(logits(model, inputs)[real], expected[real])
        report = handle.report(file=None)
        assert report.kept_tokens == report.visual_tokens
        assert (report.tokens_per_layer == real.sum(1, keepdim=True)).all()


class _Int8Layer(QuantizedLayer):
    """A quantised layer that needs no further package: whole numbers of one byte, and a scale."""

    def _quantize(self, tensor: torch.Tensor, axis: int):
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, packed):
        return packed[0] * packed[1]


@only_pruning
def test_report_counts_the_bytes_of_a_quantised_cache(pair, model):
    """Or the cache is refused at the start, by its name."""
    with torch.no_grad():
        layers = model(**plain(pair.family), use_cache=True)[CACHE].layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        pytest.skip("a quantised cache has no windows, states or blocks")
    cache = Cache(layers=[_Int8Layer(residual_length=4) for _ in layers])
    with pair.apply(model) as handle, torch.no_grad():
        try:
            model(**batch(pair), use_cache=True, **{CACHE: cache})
        except UnsupportedInputError as error:
            assert "uanti" in str(error)
            return
        report = handle.report(file=None)
    widths = [each.shape[1] * each.shape[3] for layer in layers for each in (layer.keys, layer.values)]
    entries = [count for count in report.kv_entries for _ in "kv"]
    values = len(PROMPTS) * sum(width * count for width, count in zip(widths, entries, strict=True))
    assert values <= report.kv_bytes <= 4 * values


def test_maps_that_the_attention_does_not_give_are_not_missed(pair, model):
    """Fused attention has no maps: transformers warns and returns what it has."""
    if pair.tower_refuses_maps:
        pytest.skip("the tower is asked for maps as well, and refuses")
    if model.config._attn_implementation == "eager":
        pytest.skip("has eager attention alone")
    inputs = batch(pair)
    with torch.no_grad():
        expected = model(**plain(pair.family), output_attentions=True)
        with pair.apply(model):
            output = model(**inputs, output_attentions=True)
    assert output.attentions == expected.attentions
    assert output.keys() == expected.keys()
