"""What the pruning engine does beyond the contract: several methods at once, other ways to call, wrapped models."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from prompts import CACHE, batch, generate, single
from tiny import shared_model
from torch import nn

import vltok
from vltok.engine.features import Encoding
from vltok.engine.instead import Instead


@pytest.fixture(params=tiny.PRUNABLE, ids=lambda family: family.key)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return shared_model(family)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_a_selector_and_a_judge_from_two_methods_work_together(family, model):
    inputs, selector = batch(family), vltok.DivPrune(keep_ratio=0.3)
    with vltok.apply(model, selector) as handle:
        logits(model, inputs)
        alone = handle.report(file=None)
    with vltok.apply(model, [selector, vltok.ToDRE(stages=(2,), tau=1.0, depth=0.5)]) as handle:
        logits(model, inputs)
        both = handle.report(file=None)
    for mine, theirs in zip(alone.keep_indices, both.keep_indices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(both.tokens_per_layer[:, :2], alone.tokens_per_layer[:, :2])
    assert (both.tokens_per_layer[:2, 2:] < alone.tokens_per_layer[:2, 2:]).all()


@pytest.mark.parametrize(
    "methods",
    [
        (vltok.StrideTokens(num_keep=2), vltok.DivPrune(num_keep=2)),
        (vltok.ToDRE(num_keep=2), vltok.ToDRE(stages=(2,))),
    ],
    ids=["selectors", "judges"],
)
def test_two_methods_for_the_same_job_are_refused(model, methods):
    hooks = len(model.model._forward_pre_hooks)
    with pytest.raises(ValueError, match="give one"):
        vltok.apply(model, methods)
    assert len(model.model._forward_pre_hooks) == hooks


def test_the_bare_model_and_positional_arguments_work_as_well(family, model):
    inputs = dict(single(family, "two images"))
    with vltok.apply(model, vltok.DivPrune(num_keep=3)), torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        ids = inputs.pop("input_ids")
        assert torch.equal(model.model(ids, **inputs).last_hidden_state, expected)
    with vltok.apply(model.model, vltok.DivPrune(num_keep=3)), torch.no_grad():
        assert torch.equal(model.model(ids, **inputs).last_hidden_state, expected)


def test_a_wrapped_model_is_found(family, model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    with vltok.apply(Wrapper(model), vltok.DivPrune(num_keep=3)) as handle:
        logits(model, single(family, "text around"))
        assert handle.report(file=None).kept_tokens == [[3]]


def test_prompts_given_as_embeddings_are_pruned_alike(family, model):
    inputs = dict(single(family, "two images"))
    with vltok.apply(model, vltok.DivPrune(num_keep=3)) as handle, torch.no_grad():
        positions = {}
        if "mm_token_type_ids" in inputs:  # Qwen2.5-VL makes its positions from the ids
            options = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids", "attention_mask")}
            positions["position_ids"], _ = model.model.get_rope_index(inputs["input_ids"], **options)
        expected = model(**inputs, **positions).logits
        ids = inputs.pop("input_ids")
        inputs.pop("mm_token_type_ids", None)
        actual = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs, **positions).logits
        assert handle.report(file=None).kept_tokens == [[3, 3]]
    torch.testing.assert_close(actual, expected)


def test_a_cache_that_was_emptied_takes_a_new_prompt_or_plain_text(family, model):
    text = family.inputs(["w1 w2 w3"])
    with torch.no_grad():
        plain = model(**text).logits
    with vltok.apply(model, vltok.StrideTokens(num_keep=2)), torch.no_grad():
        first = model(**single(family, "text around"), use_cache=True)
        cache = first[CACHE]
        cache.reset()
        assert torch.equal(model(**text, **{CACHE: cache}).logits, plain)
        cache.reset()
        assert torch.equal(model(**single(family, "text around"), **{CACHE: cache}).logits, first.logits)


def test_a_copy_made_between_two_calls_carries_no_graph(family, model):
    twin = copy.deepcopy(model)
    handle = vltok.apply(twin, vltok.ToDRE(num_keep=3))
    twin(**single(family, "text around")).logits.sum().backward()
    copy.deepcopy(twin)
    handle.remove()


def test_a_full_budget_changes_nothing(family, model):
    inputs = batch(family)
    real = inputs["attention_mask"].bool()
    expected, answer = logits(model, inputs), generate(model, inputs)
    with vltok.apply(model, vltok.StrideTokens(keep_ratio=1.0)):
        torch.testing.assert_close(logits(model, inputs)[real], expected[real], rtol=1e-4, atol=2e-5)
        assert torch.equal(generate(model, inputs), answer)


@pytest.mark.parametrize("margin", [1e-4, -1e-4], ids=["dropped", "kept"])
def test_without_a_cache_a_decision_stays_as_it_was_on_the_prompt(family, model, margin):
    inputs = single(family, "image first")
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=0.0)) as handle:
        logits(model, inputs)
        ((seen,),) = handle.report(file=None).relevance
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=max(seen.alpha_tv, seen.alpha_vt) + margin)):
        assert torch.equal(generate(model, inputs, steps=8, use_cache=False), generate(model, inputs, steps=8))


def test_grids_of_patches_are_read_off_the_device_once():
    """Each reading makes a GPU wait, and they are asked for image by image."""
    grids = torch.tensor([[1, 4, 6], [2, 2, 2]])
    encoding = Encoding("image", {"image_grid_thw": grids})
    assert encoding.grids == grids.tolist()
    assert encoding.grids is encoding.grids


def test_what_stands_for_a_config_can_be_copied():
    config = tiny.LLAVA.model().config
    twin = copy.copy(Instead(config, image_token_index=99))
    assert twin.image_token_index == 99 and twin.text_config is config.text_config
    assert not hasattr(twin, "no_such_field")
