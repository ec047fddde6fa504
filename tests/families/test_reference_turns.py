"""Second turns, packed rows and padding on both sides equal what the slow reference computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import reference
import tiny
import torch
from prompts import CACHE, batch, generate, hide, packed, row, rows, single, turn
from reference import assert_close
from tiny import TinyFamily, shared_model

import vltok

METHODS = {
    "keep": (vltok.DivPrune(keep_ratio=0.3), {}),
    "drop": (vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0), {"hidden_after": 2}),
    "reindex": (vltok.FasterVLM(keep_ratio=0.3, positions="reindex"), {"reindex": True}),
}
SAMPLES = ["two images", "text around", "image first", "text only"]


@pytest.fixture(params=[*tiny.PRUNABLE, *tiny.WINDOWED], ids=lambda family: family.key)
def family(request) -> TinyFamily:
    return request.param


@pytest.fixture(params=METHODS)
def case(request, family):
    if METHODS[request.param][0].positions == "reindex" and family.axes > 1:
        pytest.skip("positions on several axes are kept")
    return METHODS[request.param]


def picks_of(handle: vltok.Handle, index: int = 0) -> list[torch.Tensor]:
    return handle.report(file=None).keep_indices[index]


# Second turns


def test_a_second_turn_of_text_through_generate(family, model, case):
    method, options = case
    inputs, whole = single(family, "two images"), row(model, family, "two images")
    with vltok.apply(model, method) as handle:
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        picks = picks_of(handle)
        said = first.sequences[0, inputs.input_ids.shape[1] :].tolist()
        talk = turn(inputs, first.sequences, torch.tensor([[20, 21, 22]]))
        words = generate(model, {**talk, CACHE: first[CACHE]})[0].tolist()
    longer = reference.extend(whole, model, [*said, 20, 21, 22])
    assert words == reference.greedy(longer, model, picks, 5, **options)


def test_a_second_turn_with_a_new_image(family, model, case):
    """Without generate(): it can't bring an image to a filled cache in every family, also unpruned."""
    method, options = case
    first, second = (row(model, family, name) for name in ("two images", "text around"))
    whole = reference.join(first, second)
    with vltok.apply(model, method) as handle:
        cache = model(**single(family, "two images"), use_cache=True)[CACHE]
        picks = picks_of(handle)
        inputs = dict(single(family, "text around"))
        inputs["attention_mask"] = torch.ones(1, len(whole.embeds), dtype=torch.long)
        inputs["position_ids"] = whole.positions[..., len(first.embeds) :].unsqueeze(-2)
        output = model(**inputs, **{CACHE: cache}).logits[0]
        picks = [*picks, *picks_of(handle)]
        words = torch.tensor([[9, 10]])
        after = whole.next_position + torch.arange(2).expand(*whole.positions.shape[:-1], 1, 2)
        third = model(input_ids=words, position_ids=after, **{CACHE: cache}).logits[0]
    expected, where = reference.logits(reference.extend(whole, model, [9, 10]), picks, **options)
    assert_close(third, expected[-2:])
    mine, begin = where[:-2], len(first.embeds)
    seen = mine >= begin
    if "hidden_after" in options:
        seen &= ~whole.visual[mine]
    assert_close(output[mine[seen] - begin], expected[:-2][seen])


def test_new_images_for_some_rows_of_a_padded_batch(family, model, case):
    method, options = case
    if family.axes > 1:
        pytest.skip("positions of several turns are given by hand, row by row, in the test above")
    firsts, seconds = rows(model, family), ["text only", "image first", "text around", "image first"]
    opening, closing = batch(family), batch(family, "left", seconds)
    behind = rows(model, family, seconds)
    wholes = [reference.join(a, b) for a, b in zip(firsts, behind, strict=True)]
    with vltok.apply(model, method) as handle:
        start = opening.attention_mask.cumsum(1) - 1
        cache = model(**opening, position_ids=start.clamp(min=0), use_cache=True)[CACHE]
        before = handle.report(file=None).keep_indices
        mask = torch.cat([opening.attention_mask, closing.attention_mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, opening.input_ids.shape[1] :]
        inputs = {**closing, "attention_mask": mask, "position_ids": positions}
        columns = [own.nonzero().squeeze(1) for own in mask]  # windows count the padding between two turns
        output = model(**inputs, **{CACHE: cache}).logits
        after = handle.report(file=None).keep_indices
    for index, whole in enumerate(wholes):
        picks = [*before[index], *after[index]]
        whole = replace(whole, index=columns[index] - columns[index][0])
        expected, where = reference.logits(whole, picks, **options)
        begin = len(firsts[index].embeds)
        seen = where >= begin
        if "hidden_after" in options:
            seen &= ~whole.visual[where]
        mine = output[index][closing.attention_mask[index].bool()]
        assert_close(mine[where[seen] - begin], expected[seen])


def test_a_cache_continues_in_two_ways(family, model, case):
    method, options = case
    whole = row(model, family, "two images")
    with vltok.apply(model, method) as handle:
        cache = model(**single(family, "two images"), use_cache=True)[CACHE]
        picks = picks_of(handle)
        for words in ([9, 10, 11], [12]):
            logits = model(input_ids=torch.tensor([words]), **{CACHE: copy.deepcopy(cache)}).logits[0]
            longer = reference.extend(whole, model, words)
            assert_close(logits, reference.logits(longer, picks, **options)[0][-len(words) :])


# Packed rows


def test_samples_packed_in_one_row_stay_apart(family, model, case):
    method, options = case
    whole = reference.pack(rows(model, family, SAMPLES))
    with vltok.apply(model, method) as handle:
        pruned = model(**packed(model, family, SAMPLES), use_cache=False).logits[0]
        picks = picks_of(handle)
    expected, where = reference.logits(whole, picks, **options)
    seen = ~whole.visual[where] if "hidden_after" in options else slice(None)
    assert_close(pruned[where][seen], expected[seen])


def test_samples_of_a_packed_row_drop_each_for_itself(family, model):
    def run(tau: float):
        with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=tau)) as handle:
            return model(**packed(model, family, SAMPLES[:3]), use_cache=False).logits[0], picks_of(handle)

    alphas = []
    for name in SAMPLES[:3]:
        with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=0.0)) as handle:
            model(**single(family, name))
            (record,) = handle.report(file=None).relevance[0]
            alphas.append(max(record.alpha_tv, record.alpha_vt))
    tau = sum(sorted(alphas)[:2]) / 2  # one of three samples drops
    pruned, picks = run(tau)
    wholes = rows(model, family, SAMPLES[:3])
    drops = [2 if alpha < tau else None for alpha, whole in zip(alphas, wholes, strict=True) for _ in whole.images]
    assert {2, None} == set(drops)
    whole = reference.pack(wholes)
    expected, where = reference.logits(whole, picks, hidden_after=drops)
    seen = ~whole.visual[where] | (reference.leaving(whole, drops)[where] > 4)
    assert_close(pruned[where][seen], expected[seen])


def test_the_packed_reference_is_the_model(family, model):
    whole = reference.pack(rows(model, family, SAMPLES))
    everything = [torch.arange(len(image)) for image in whole.images]
    plain = model(**packed(model, family, SAMPLES), use_cache=False).logits[0]
    assert_close(plain, reference.logits(whole, everything)[0])


# Padding


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rows_padded_on_any_side(family, model, case, side):
    method, options = case
    inputs, wholes = hide(batch(family, "right" if side == "right" else "left"), right=2 * (side == "both")), None
    wholes = rows(model, family)
    with vltok.apply(model, method) as handle:
        pruned = model(**inputs).logits
        report = handle.report(file=None)
    for index, whole in enumerate(wholes):
        expected, where = reference.logits(whole, report.keep_indices[index], **options)
        seen = ~whole.visual[where] if "hidden_after" in options else slice(None)
        mine = pruned[index][inputs["attention_mask"][index].bool()]
        assert_close(mine[where][seen], expected[seen])


def test_words_after_a_padded_batch_see_the_window_of_their_row(family, case):
    method, options = case
    model = shared_model(family)
    inputs, wholes = batch(family), rows(model, family)
    with vltok.apply(model, method) as handle:
        words = generate(model, inputs, steps=12)
        picks = handle.report(file=None).keep_indices
    for index, whole in enumerate(wholes):
        assert words[index].tolist() == reference.greedy(whole, model, picks[index], 12, **options)
