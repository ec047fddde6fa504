"""A cache goes on: second turns, reuse, reordering, cropping, for every method on every family."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from calls import batch, generate, plain, positions, promise, prompt, single
from prompts import CACHE, turn
from reference import assert_close
from rows import dropping_too, few_pruning, whatever_is_asked_dropping_too
from tiny import picture

import vltok

NEW = torch.tensor([[20, 21, 22]])
CHANGES = {
    "reorder_cache": torch.tensor([1, 0]),
    "batch_select_indices": torch.tensor([1]),
    "batch_repeat_interleave": 2,
}
TALK = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
}


@whatever_is_asked_dropping_too
def test_a_second_turn_equals_the_whole_conversation_anew(pair, model):
    inputs = prompt(pair, "w1 <image> w2 w3")
    with pair.apply(model):
        first = model.generate(**inputs, **TALK)
        talk = turn(inputs, first.sequences, NEW, pair.family.word_type)
        expected = generate(model, {**inputs, **talk})
        assert torch.equal(generate(model, {**talk, CACHE: first[CACHE]}), expected)


@whatever_is_asked_dropping_too
def test_a_third_turn_with_a_new_image_equals_the_whole_conversation_anew(pair, model):
    if not pair.family.new_image_in_turn:
        pytest.skip("the unpruned generate() can't")
    inputs, new = prompt(pair, "w1 <image> w2 w3"), prompt(pair, "w8 <image> w9 w5", (1,))
    with pair.apply(model):
        first = model.generate(**inputs, **TALK)
        talk = turn(inputs, first.sequences, NEW, pair.family.word_type)
        second = model.generate(**talk, **{CACHE: first[CACHE]}, **TALK)
        talk = turn(inputs, second.sequences, new["input_ids"], pair.family.word_type)
        pixels = [name for name in new if name not in talk]
        got = generate(model, {**talk, **{name: new[name] for name in pixels}, CACHE: second[CACHE]})
        both = pair.inputs(["<image> <image>"], [picture(seed, pair.family.size) for seed in (0, 1)])
        assert torch.equal(got, generate(model, {**talk, **{name: both[name] for name in pixels}}))


@dropping_too
def test_rows_of_a_batch_take_new_words_of_unequal_number(pair, model):
    """Shorter rows are padded between the turns, where nobody may look."""
    if pair.family.windowed:
        pytest.skip("windows count the padding between two turns, also unpruned")
    promise("padding between turns", words_of_unequal_number_follow, pair, model)


def words_of_unequal_number_follow(pair, model):
    inputs, words = batch(pair), [[20, 21, 22], [23], [24, 25]]
    new = torch.tensor([[0] * (3 - len(row)) + row for row in words])
    with pair.apply(model):
        first = model.generate(**inputs, **TALK)
        talk = turn(inputs, first.sequences, new, pair.family.word_type)
        talk["attention_mask"][:, -3:] = (new > 0).long()
        got = generate(model, {**talk, CACHE: first[CACHE]})
        for index, row in enumerate(words):
            real = inputs["attention_mask"][index].bool()
            alone = single(pair, index)
            begun = model.generate(**alone, **TALK)
            said = torch.cat([alone["input_ids"], first.sequences[index : index + 1, len(real) :]], dim=1)
            assert torch.equal(begun.sequences, said)
            rest = turn(alone, said, torch.tensor([row]), pair.family.word_type)
            assert torch.equal(generate(model, {**rest, CACHE: begun[CACHE]})[0], got[index])


@whatever_is_asked_dropping_too
def test_a_prefix_is_used_again(pair, model):
    inputs = prompt(pair, "w1 <image> w2 w3")
    with pair.apply(model), torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        for new in (NEW, NEW + 5, NEW[:, :1]):
            talk = turn(inputs, inputs["input_ids"], new, pair.family.word_type)
            expected = generate(model, {**inputs, **talk})
            assert torch.equal(generate(model, {**talk, CACHE: copy.deepcopy(cache)}), expected)


def continued(pair, model, cache, words: torch.Tensor, first: torch.Tensor, **options) -> torch.Tensor:
    """Logits of words (B, N) on a cache; `first` is the position of the first, (B,)."""
    at = first[:, None] + torch.arange(words.shape[1])
    with torch.no_grad():
        at = at.expand(*pair.axes, -1, -1)
        return model(input_ids=words, position_ids=at, **{CACHE: cache}, **options).logits


def behind(model, inputs) -> torch.Tensor:
    """The position behind an unpadded prompt, (1,)."""
    return positions(model, inputs).reshape(-1).max()[None] + 1


@dropping_too
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_cropped_cache_equals_that_of_a_shorter_conversation(pair, model, cut):
    """One and two words of the answer go, or the answer and two words of the prompt."""
    if pair.family.windowed:
        pytest.skip("a window that has moved on can't be cropped back, also unpruned")
    if pair.reads_question and cut > 3:
        pytest.skip("the shorter prompt asks something else")
    promise("crop" if cut < 3 else "crop into the prompt", functools.partial(crop_goes_back, cut=cut), pair, model)


def crop_goes_back(pair, model, cut):
    inputs, words = prompt(pair, "w1 <image> w2 w3 w4"), torch.tensor([[30, 31]])
    with pair.apply(model), torch.no_grad():
        at = behind(model, inputs)
        cache = model(**inputs, use_cache=True)[CACHE]
        continued(pair, model, cache, words, at)
        cache.crop(-cut)
        got = continued(pair, model, cache, NEW, at + 2 - cut)
        shorter = prompt(pair, "w1 <image> w2 w3 w4" if cut < 3 else "w1 <image> w2")
        cache = model(**shorter, use_cache=True)[CACHE]
        if cut == 1:
            continued(pair, model, cache, words[:, :1], at)
        expected = continued(pair, model, cache, NEW, at + 2 - cut)
    assert_close(got, expected)


@dropping_too
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_a_cache_are_reordered_repeated_and_selected(pair, model, change):
    promise(change, functools.partial(rows_of_a_cache_change, change=change), pair, model)


def rows_of_a_cache_change(pair, model, change):
    texts = ["w1 <image> w2 w3", "w5 w6 <image> w6 w7 w8 w9"]  # the first is padded
    singles = [prompt(pair, text, (seed,)) for seed, text in enumerate(texts)]
    both = dict(pair.inputs(texts, [picture(seed, pair.family.size) for seed in range(2)]))
    at = torch.cat([behind(model, each) for each in singles])
    if not pair.axes:
        both["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
    mask = torch.nn.functional.pad(both["attention_mask"], (0, 3), value=1)
    with pair.apply(model), torch.no_grad():
        expected = []
        for each, first in zip(singles, at, strict=True):
            own = positions(model, each).view(*pair.axes, 1, -1)  # for a batch some would count from 1
            cache = model(**each, position_ids=own, use_cache=True)[CACHE]
            expected.append(continued(pair, model, cache, NEW, first[None]))
        expected = torch.cat(expected)
        cache = model(**both, use_cache=True)[CACHE]
        getattr(cache, change)(CHANGES[change])
        order = torch.arange(2).repeat_interleave(2) if change == "batch_repeat_interleave" else CHANGES[change]
        words = NEW.expand(len(order), -1)
        got = continued(pair, model, cache, words, at[order], attention_mask=mask[order])
        assert_close(got, expected[order])


@dropping_too
def test_a_later_mask_hides_earlier_tokens_as_unpruned(pair, model):
    """With every token kept: what is hidden from the new words is what the unpruned model hides."""
    inputs = prompt(pair, "w1 w2 <image> w3 w4")
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, length + 3, dtype=torch.long)
    hiding = mask.index_fill(1, torch.tensor([0, 1, length // 2, length - 1]), 0)

    def answer(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True)[CACHE]
            at = (behind(model, inputs) + torch.arange(3)).expand(*pair.axes, 1, -1)
            return model(input_ids=NEW, attention_mask=mask, position_ids=at, **{CACHE: cache}).logits

    with pair.apply(model):
        hidden = answer(hiding)
        assert not torch.allclose(hidden, answer(mask), atol=1e-3)
    if pair.prunes:
        expected = answer(hiding)
        with vltok.apply(model, vltok.StrideTokens(keep_ratio=1.0)):
            assert_close(answer(hiding), expected)


@few_pruning
def test_a_pruned_cache_is_not_used_without_its_handle_in_silence(pair, model):
    inputs = prompt(pair, "w1 <image> w2 w3")
    at = behind(model, inputs)
    with pair.apply(model), torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        expected = continued(pair, model, copy.deepcopy(cache), NEW, at)
    try:
        got = continued(pair, model, cache, NEW, at)
    except vltok.errors.VltokError:
        return
    assert_close(got, expected)


def lengths(cache) -> list[int | None]:
    """What each layer of a cache counts; None where it holds a state, or attends to the keys of another."""
    counted = []
    for layer in range(len(cache.layers)):
        try:
            counted.append(cache.get_seq_length(layer))
        except ValueError:
            counted.append(None)
    return counted


@dropping_too
def test_the_cache_counts_the_tokens_of_the_conversation(pair, model):
    inputs = batch(pair)
    with torch.no_grad():
        unpruned = lengths(model(**plain(pair.family), use_cache=True)[CACHE])
        with pair.apply(model):
            cache = model(**inputs, use_cache=True)[CACHE]
    count = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == count
    assert lengths(cache) == [None if each is None else count for each in unpruned]
