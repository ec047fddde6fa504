"""A pruned model computes what a prompt pruned by hand computes, for every family, with windows and without."""

from __future__ import annotations

import copy
import itertools

import pytest
import reference
import tiny
import torch
from prompts import CACHE, PROMPTS, batch, generate, row, rows, single
from reference import assert_close
from tiny import TinyFamily, shared_model
from versions import orders_repeated_images

import vltok

STAGE_1 = vltok.ToDRE(keep_ratio=0.3, relevance=False)
BOTH_STAGES = vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0)  # after the second of four layers
REINDEXED = vltok.FasterVLM(keep_ratio=0.3, positions="reindex")
WITH_IMAGES = [name for name, (_, sizes) in PROMPTS.items() if sizes]


@pytest.fixture(params=[*tiny.PRUNABLE, *tiny.WINDOWED], ids=lambda family: family.key)
def family(request) -> TinyFamily:
    return request.param


@pytest.fixture
def one_axis(family) -> None:
    if family.axes > 1:
        pytest.skip("positions on several axes are kept")


def compare(model, family: TinyFamily, name: str, method: vltok.Method, **options) -> None:
    """Compare the logits of the kept tokens of one prompt."""
    inputs, whole = single(family, name), row(model, family, name)
    with vltok.apply(model, method) as handle:
        pruned = model(**inputs).logits[0]
        picks = handle.report(file=None).keep_indices[0]
    expected, where = reference.logits(whole, picks, **options)
    assert sum(map(len, picks)) < whole.visual.sum()
    seen = ~whole.visual[where] if "hidden_after" in options else slice(None)
    assert_close(pruned[where][seen], expected[seen])


@pytest.mark.parametrize("name", PROMPTS)
def test_the_reference_without_pruning_is_the_model(family, model, name):
    whole = row(model, family, name)
    everything = [torch.arange(len(image)) for image in whole.images]
    assert_close(model(**single(family, name)).logits[0], reference.logits(whole, everything)[0])


@pytest.mark.parametrize("hidden_after", [None, 2])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_two_references_agree(family, name, hidden_after):
    eager = shared_model(family, "eager")
    whole = row(eager, family, name)
    picks = [torch.arange(1, len(image), 3) for image in whole.images]
    expected, where = reference.logits(whole, picks, hidden_after=hidden_after)
    with reference.hidden_keys(eager, reference.dropped(whole, picks, hidden_after)):
        hidden = eager(**single(family, name), use_cache=False).logits[0][where]
    seen = ~whole.visual[where] if hidden_after else slice(None)
    assert_close(hidden[seen], expected[seen])


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_a_pruned_prompt_equals_one_built_by_hand(family, model, name):
    compare(model, family, name, STAGE_1)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_reindexed_positions_equal_a_prompt_that_was_always_short(family, one_axis, model, name):
    compare(model, family, name, REINDEXED, reindex=True)


@pytest.mark.parametrize("name", [name for name in WITH_IMAGES if name != "image last"])
def test_stage_2_equals_hiding_the_visual_keys_from_later_layers(family, model, name):
    compare(model, family, name, BOTH_STAGES, hidden_after=2)


@pytest.mark.parametrize("layers", [(1,), (3,)], ids=str)
def test_stage_2_without_stage_1_at_any_layer(family, model, layers):
    inputs, whole = single(family, "two images"), row(model, family, "two images")
    method = vltok.ToDRE(stages=(2,), tau=1.0, depth=tuple(layer / 4 for layer in layers))
    with vltok.apply(model, method) as handle:
        output = model(**inputs, use_cache=True)
        report = handle.report(file=None)
    everything = [torch.arange(len(image)) for image in whole.images]
    expected, where = reference.logits(whole, everything, hidden_after=layers[0])
    text = ~whole.visual[where]
    assert_close(output.logits[0][text], expected[text])
    lengths = [len(where)] * layers[0] + [int(text.sum())] * (4 - layers[0])
    assert report.tokens_per_layer[0].tolist() == lengths
    held = [layer.keys.shape[-2] for layer in output[CACHE].layers]
    rooms = [size - 1 if size else len(where) for _, size in reference.windows(model.model.language_model)]
    assert held == [min(length, room) for length, room in zip(lengths, rooms, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches_with_rows_that_drop_and_rows_that_do_not(family, side, attention):
    model = shared_model(family, attention)
    inputs, wholes = batch(family, side), rows(model, family)
    with vltok.apply(model, BOTH_STAGES) as handle:
        model(**inputs)
        alphas = [max(r[0].alpha_tv, r[0].alpha_vt) if r else 1.0 for r in handle.report(file=None).relevance]
    tau = sorted(alphas)[1]  # strictly below it there is one row
    assert tau - min(alphas) > 1e-3
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=tau)) as handle:
        pruned = model(**inputs).logits
        report = handle.report(file=None)
    assert [bool(r and r[0].dropped) for r in report.relevance] == [alpha < tau for alpha in alphas]
    for index, whole in enumerate(wholes):
        drops = alphas[index] < tau
        expected, where = reference.logits(whole, report.keep_indices[index], hidden_after=2 if drops else None)
        seen = ~whole.visual[where] if drops else slice(None)
        mine = pruned[index][inputs.attention_mask[index].bool()]
        assert_close(mine[where][seen], expected[seen])


def test_rows_of_a_batch_that_drop_after_different_layers(family, model):
    inputs = batch(family)
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=(0.25, 0.5, 0.75), tau=0.0)) as handle:
        model(**inputs)
        records = handle.report(file=None).relevance
    alphas = torch.tensor([[max(r.alpha_tv, r.alpha_vt) for r in row] or [1.0] * 3 for row in records])  # (B, 3)

    def drops(layers: tuple[int, ...], tau: float) -> list[int | None]:
        return [next((layer for layer in layers if row[layer - 1] < tau), None) for row in alphas.tolist()]

    options = itertools.product([(1, 2, 3), (1, 2), (2, 3), (1, 3)], alphas.flatten().tolist())
    layers, tau = max(options, key=lambda option: len(set(drops(*option))))
    drop_after = drops(layers, tau)
    assert len(set(drop_after)) >= 3, "two rows must drop after different layers, and one (of text alone) never"
    method = vltok.ToDRE(keep_ratio=0.3, depth=tuple(layer / 4 for layer in layers), tau=tau)
    with vltok.apply(model, method) as handle:
        output = model(**inputs, use_cache=True)
        report = handle.report(file=None)
        words = torch.full((len(drop_after), 2), 9)
        mask = torch.cat([inputs.attention_mask, torch.ones_like(words)], dim=1)
        after = model(input_ids=words, attention_mask=mask, **{CACHE: output[CACHE]}).logits
    for index, (whole, layer) in enumerate(zip(rows(model, family), drop_after, strict=True)):
        longer = reference.extend(whole, model, [9, 9])
        expected, where = reference.logits(longer, report.keep_indices[index], hidden_after=layer)
        assert_close(after[index], expected[-2:])
        seen = ~whole.visual[where[:-2]] if layer else slice(None)
        mine = output.logits[index][inputs.attention_mask[index].bool()]
        assert_close(mine[where[:-2]][seen], expected[:-2][seen])
        text, kept = int((~whole.visual).sum()), len(where) - 2
        assert report.tokens_per_layer[index].tolist() == [kept] * (layer or 4) + [text] * (4 - (layer or 4))


def test_relevance_ratios_equal_those_of_materialised_attention(family, model):
    eager = shared_model(family, "eager")
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=(0.25, 0.5, 0.75), tau=0.0)) as handle:
        model(**batch(family))
        report = handle.report(file=None)
    for index, whole in enumerate(rows(eager, family)[:-1]):
        assert [record.layer for record in report.relevance[index]] == [1, 2, 3]
        for record in report.relevance[index]:
            expected = reference.attention_ratios(eager, whole, report.keep_indices[index], record.layer)
            assert (record.alpha_tv, record.alpha_vt) == pytest.approx(expected, abs=1e-5)
    assert report.relevance[-1] == []


def test_greedy_generation_equals_recomputing_every_word_by_hand(family, model):
    inputs, wholes = batch(family), rows(model, family)
    cases = [(STAGE_1, {}), (BOTH_STAGES, {"hidden_after": 2})]
    if family.axes == 1:
        cases.append((REINDEXED, {"reindex": True}))
    for method, options in cases:
        with vltok.apply(model, method) as handle:
            words = generate(model, inputs)
            picks = handle.report(file=None).keep_indices
            assert torch.equal(generate(model, inputs, use_cache=False), words)
        for index, whole in enumerate(wholes):
            own = options if whole.images else {}
            assert words[index].tolist() == reference.greedy(whole, model, picks[index], 5, **own)


@orders_repeated_images
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}],
    ids=["beams", "samples"],
)
def test_beams_and_samples_equal_those_of_a_natively_short_prompt(family, one_axis, model, options):
    whole = row(model, family, "two images")
    with vltok.apply(model, REINDEXED) as handle:
        torch.manual_seed(0)
        pruned = generate(model, single(family, "two images"), **options)
        picks = handle.report(file=None).keep_indices[0]
    short = whole.embeds[reference.kept(whole, picks)].unsqueeze(0)
    torch.manual_seed(0)
    assert torch.equal(pruned, generate(model, {"inputs_embeds": short}, **options))
    assert len(pruned.unique(dim=0)) > 1


def test_gradients_equal_those_of_a_prompt_built_by_hand(family, model):
    trained = copy.deepcopy(model)
    name = "two images"
    inputs = single(family, name)
    labels = inputs.input_ids.masked_fill(inputs.input_ids == model.config.image_token_id, -100)
    with torch.enable_grad():
        with vltok.apply(trained, STAGE_1) as handle:
            loss = trained(**inputs, labels=labels).loss
            loss.backward()
            picks = handle.report(file=None).keep_indices[0]
        gradients = {key: weight.grad for key, weight in trained.named_parameters()}
        trained.zero_grad()
        scores, where = reference.logits(row(trained, family, name), picks)
        target = labels[0][where][1:]  # a word is predicted from the last kept token before it
        expected = torch.nn.functional.cross_entropy(scores[:-1], target)
        expected.backward()
    torch.testing.assert_close(loss, expected)
    used = [key for key, weight in trained.named_parameters() if weight.grad is not None]
    assert any("vis" in key for key in used) and len(used) > 50
    for key in used:
        torch.testing.assert_close(gradients[key], dict(trained.named_parameters())[key].grad, rtol=1e-3, atol=1e-5)


def test_a_fault_positions_of_the_wrong_row_are_caught(family, model):
    """The deliberate fault of this file: kept tokens stand where those of another row stood."""
    inputs, wholes = batch(family), rows(model, family)

    def mismatch(handle: vltok.Handle) -> float:
        pruned = model(**inputs).logits
        picks = handle.report(file=None).keep_indices
        gaps = []
        for index, whole in enumerate(wholes):
            expected, where = reference.logits(whole, picks[index])
            gaps.append((pruned[index][inputs.attention_mask[index].bool()][where] - expected).abs().max())
        return float(max(gaps))

    def wrong(module, args, kwargs):
        return args, {**kwargs, "position_ids": kwargs["position_ids"].roll(1, dims=-2)}

    with vltok.apply(model, STAGE_1) as handle:
        assert mismatch(handle) < 1e-4
        hook = model.model.language_model.register_forward_pre_hook(wrong, with_kwargs=True)
        try:
            assert mismatch(handle) > 1e-2
        finally:
            hook.remove()
