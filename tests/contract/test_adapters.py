"""PEFT may come before or after a method: what counts is what the model is when it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import batch, generate, logits
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from reference import assert_close
from rows import few

import vltok
from vltok.errors import UnsupportedModelError

LORA = {"r": 4, "target_modules": r".*\.(q_proj|v_proj|qkv)"}
PREFIX_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def adapted(model: torch.nn.Module, **options) -> torch.nn.Module:
    """The model with an adapter that changes what it computes, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(model, LoraConfig(**{**LORA, **options})).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@few
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_counts_whether_it_comes_before_the_method_or_after(pair, model, dora):
    inputs = batch(pair)
    early, late = copy.deepcopy(model), copy.deepcopy(model)
    plain = logits(model, pair.family.inputs(["w1 w2"]))
    early = adapted(early, use_dora=dora)
    try:
        prunes = not pair.apply(early).added_modules
    except UnsupportedModelError:  # weights of attention that an adapter sits on can't be started from
        assert not pair.prunes
        prunes = False
    second = pair.apply(late)
    late = adapted(late, use_dora=dora)
    if prunes:  # PEFT finds the layers of weights that a method brought as well
        real = inputs["attention_mask"].bool()
        assert_close(logits(late, inputs)[real], logits(early, inputs)[real])
        assert torch.equal(generate(late, inputs), generate(early, inputs))
    assert not torch.equal(logits(late, pair.family.inputs(["w1 w2"])), plain)
    answer = logits(late, inputs)
    merged = late.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), answer, rtol=1e-3, atol=1e-3)
    assert second.is_attached


@few
def test_an_adapter_that_is_switched_off_or_unloaded_counts_no_more(pair, model):
    inputs, host = batch(pair), copy.deepcopy(model)
    handle = pair.apply(host)
    expected = logits(host, inputs)
    wrapped = adapted(host)
    with wrapped.disable_adapter():
        assert_close(logits(wrapped, inputs), expected)
    assert_close(logits(wrapped.unload(), inputs), expected)
    assert handle.is_attached


@few
@pytest.mark.parametrize("order", ["method first", "adapter first"])
def test_modules_that_are_saved_with_an_adapter_change_nothing(pair, model, order):
    inputs, host = batch(pair), copy.deepcopy(model)
    with pair.apply(model):
        expected = logits(model, inputs)
    options = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["embed_tokens", "lm_head"]}
    config = LoraConfig(r=2, **options)
    if order == "adapter first":
        host = get_peft_model(host, config).eval()
        pair.apply(host)
    else:
        pair.apply(host)
        host = get_peft_model(host, config).eval()
    assert_close(logits(host, inputs), expected)


@few
def test_a_learned_prefix_stands_before_the_prompt(pair, model):
    """Where nothing is left out the answer is the unpruned model's."""
    host, inputs = copy.deepcopy(model), pair.family.inputs(["w1 w2 w3"])
    for name in PREFIX_FIELDS:  # where PEFT looks for them
        if not hasattr(host.config, name):
            setattr(host.config, name, getattr(host.config.text_config, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        try:
            host = get_peft_model(host, config).eval()
            expected = logits(host, inputs)
        except (AttributeError, RuntimeError):
            pytest.skip("PEFT can't put a prefix before this model's prompts")
    with pair.apply(host):
        assert_close(logits(host, inputs), expected)
        answer = logits(host, batch(pair))
        assert answer.isfinite().all()
    if pair.prunes:
        expected, real = logits(host, batch(pair)), batch(pair)["attention_mask"].bool()
        with vltok.apply(host, vltok.StrideTokens(keep_ratio=1.0)):
            assert_close(logits(host, batch(pair))[real], expected[real])
