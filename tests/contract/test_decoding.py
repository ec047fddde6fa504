"""Every way to decode gives the same answer, for every method on every family."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from calls import PROMPTS, batch, generate, promise, prompt, same_picks, single
from rows import dropping_too, only_pruning
from tiny import TinyFamily
from versions import orders_repeated_images

import vltok
from vltok.errors import UnsupportedInputError


@functools.lru_cache
def draft_model(family: TinyFamily) -> torch.nn.Module:
    """Another model of the family, which often guesses wrong."""
    return family.model(seed=3)


def copies_answer_alike(pair, model):
    """Whichever copy of a prompt is asked, it has the images of the prompt."""
    with pair.apply(model):
        words = generate(model, batch(pair), do_sample=True, top_k=1, num_return_sequences=2)
        assert torch.equal(words[::2], words[1::2])


def refuses_copies(pair, model, options) -> bool:
    """Whether copies of prompts are refused: where the unpruned model gives them the images of others."""
    if "copies" not in pair.family.unable or options.get("num_beams", options.get("num_return_sequences", 1)) == 1:
        return False
    with pytest.raises(AssertionError):
        copies_answer_alike(pair.unpruned, model)
    with pair.apply(model), pytest.raises(UnsupportedInputError, match="mixes up the images"):
        generate(model, batch(pair), **options)
    return True


@dropping_too
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_beams": 3}, marks=orders_repeated_images),
        pytest.param({"num_beams": 2, "num_return_sequences": 2}, marks=orders_repeated_images),
    ],
    ids=str,
)
def test_generation_with_and_without_a_cache_agrees(pair, model, options):
    if refuses_copies(pair, model, options):
        return
    with pair.apply(model):
        cached = generate(model, batch(pair), use_cache=True, **options)
        assert torch.equal(cached, generate(model, batch(pair), use_cache=False, **options))


@dropping_too
def test_sampling_follows_the_seed(pair, model):
    inputs, options = batch(pair), {"do_sample": True, "num_return_sequences": 2}
    if refuses_copies(pair, model, options):
        return
    with pair.apply(model):
        torch.manual_seed(0)
        first = generate(model, inputs, **options)
        torch.manual_seed(0)
        assert torch.equal(generate(model, inputs, **options), first)
    assert first.shape == (2 * len(PROMPTS), 5)


def assert_same_relevance(report: vltok.Report, expected: vltok.Report) -> None:
    """Compare what was measured inside the decoder, up to rounding, and what was decided."""
    for row, wanted in zip(report.relevance, expected.relevance, strict=True):
        assert row == [
            replace(
                each, alpha_tv=pytest.approx(each.alpha_tv, abs=1e-6), alpha_vt=pytest.approx(each.alpha_vt, abs=1e-6)
            )
            for each in wanted
        ]


@only_pruning
def test_guesses_of_a_prompt_or_a_draft_model_do_not_change_the_answer(pair, model):
    promise("guesses", guesses_change_nothing, pair, model)


def guesses_change_nothing(pair, model):
    draft = draft_model(pair.family)
    with pair.apply(model) as handle:
        for text in ("w1 w2 <image> w1 w2 w1 w2", "<image> w4 w3 w4 w3 w4"):
            inputs = prompt(pair, text)
            expected = generate(model, inputs, steps=10)
            decided = handle.report(file=None) if pair.prunes else None
            for guesses in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
                assert torch.equal(generate(model, inputs, steps=10, **guesses), expected)
                if pair.prunes:
                    assert same_picks(handle.report(file=None).keep_indices, decided.keep_indices)
                    # More tokens come at once, and sums over them are rounded in another way.
                    assert_same_relevance(handle.report(file=None), decided)


@only_pruning
def test_a_static_cache_is_refused_before_anything_runs(pair, model):
    with pair.apply(model), pytest.raises(UnsupportedInputError, match="StaticCache"):
        generate(model, single(pair, 0), cache_implementation="static")
