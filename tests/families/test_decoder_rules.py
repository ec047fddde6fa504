"""Rules inside the decoder against the maps of the eager model, from which what left is hidden layer by layer.

What left a layer is read off the cache: each of its layers knows which tokens its entries stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import reference
import tiny
import torch
import zoo
from prompts import CACHE, PROMPTS, batch, generate, packed, row, single
from reference import assert_close
from tiny import INTERNVL, LLAVA, LLAVA_SIGLIP, QWEN2_5_VL, TinyFamily, shared_model
from torch import nn
from zoo.qwen import MINIMAX_M3_VL_SPARSE

import vltok
from vltok.methods.pruning.dart_decoder import select_unlike
from vltok.methods.pruning.rule import layer_at
from vltok.visual import DecoderState

RULES = {
    "fastv": vltok.FastV(keep_ratio=0.3),
    "pyramid_drop": vltok.PyramidDrop(),
    "sparsevlm": vltok.SparseVLM(depths=(0.25, 0.5, 0.75)),
    "dart_decoder": vltok.DARTDecoder(num_keep=7, layer=2),
}
FAMILIES = [LLAVA, QWEN2_5_VL, INTERNVL, *tiny.WINDOWED]
NAMES = ["two images", "text around", "image first", "text only"]
Scores = torch.Tensor


@pytest.fixture(params=FAMILIES, ids=lambda family: family.key)
def family(request) -> TinyFamily:
    return request.param


@pytest.fixture(params=RULES)
def rule(request, family) -> vltok.DecoderRule:
    if request.param == "dart_decoder" and family.windowed:
        pytest.skip("keys are read off the unpruned cache, where a window keeps the last ones alone")
    return RULES[request.param]


# What should leave, from the maps of the eager model


def maps_of(eager: nn.Module, inputs: Any, gone: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Attention maps where tokens, (T,) for each layer, are hidden: mean over the heads, (T, T) each."""
    with reference.hidden_keys(eager, [each[None] for each in gone]):
        output = eager(**inputs, output_attentions=True, use_cache=False)
    return [each[0].mean(0) for each in output.attentions]


def words_that_rate(whole: reference.Row, entered: torch.Tensor) -> list[int]:
    text = (~whole.visual & (whole.visual.cumsum(0) > 0)).nonzero().squeeze(1)
    products = whole.embeds[entered].double() @ whole.embeds[text].double().T
    share = products.softmax(-1).mean(0)
    return text[share > share.mean()].tolist() or [len(whole.embeds) - 1]


def layer_inputs(eager: nn.Module, inputs: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention of a layer looks at, (T, D), and its keys, (T, C), of the unpruned model."""
    seen = []
    attention = eager.model.language_model.layers[layer - 1].self_attn
    hook = attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"][0]), with_kwargs=True)
    cache = eager(**inputs, use_cache=True)[CACHE]
    hook.remove()
    return seen[0], cache.layers[layer - 1].keys[0].transpose(0, 1).flatten(1)


def expected_gone(
    eager: nn.Module, family: TinyFamily, name: str, rule: vltok.DecoderRule, entered: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """What each layer works without, (T,) each, of a prompt of which `entered` of each image enter the decoder."""
    whole, inputs = row(eager, family, name), single(family, name)
    layers, length = len(eager.model.language_model.layers), len(whole.embeds)
    images = whole.images if entered is None else [own[i] for own, i in zip(whole.images, entered, strict=True)]
    start = whole.visual.clone()
    for own in images:
        start[own] = False
    gone = [start] * layers
    for layer in rule.layers(layers) if images else ():
        state = SimpleNamespace(image_lengths=[[len(own) for own in images]], layer=layer, num_layers=layers)
        budgets, left = rule.budgets(state)[0], gone[-1].clone()
        if isinstance(rule, vltok.DARTDecoder):
            text = (~whole.visual & (whole.visual.cumsum(0) > 0)).nonzero().squeeze(1)
            given = layer_inputs(eager, inputs, layer)
            kept = [select_unlike(*given, own, text, k).tolist() for own, k in zip(images, budgets, strict=True)]
        else:
            queries = words_that_rate(whole, torch.cat(images)) if isinstance(rule, vltok.SparseVLM) else [length - 1]
            score = maps_of(eager, inputs, gone)[layer - 1][queries].mean(0).tolist()
            still = [[place for place in own.tolist() if not left[place]] for own in images]
            kept = [sorted(own, key=lambda p, s=score: (-s[p], p))[:k] for own, k in zip(still, budgets, strict=True)]
        for own, stay in zip(images, kept, strict=True):
            left[own] = True
            left[stay] = False
        gone = gone[:layer] + [left] * (layers - layer)
    return gone


def gone_in(cache: Any, row: int, real: torch.Tensor) -> list[torch.Tensor]:
    """What each layer of a cache has no entry of, among the tokens of a row that are no padding, (T,) each."""
    found = []
    for layer in cache.layers:
        held = layer.labels()[row]
        gone = torch.ones(len(real), dtype=torch.bool)
        gone[held[held >= 0]] = False
        found.append(gone[real])
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_leaves_is_what_the_eager_maps_say_for_every_row_of_a_padded_batch(family, rule, side):
    model, inputs = shared_model(family), batch(family, side)
    with vltok.apply(model, rule) as handle:
        cache = model(**inputs, use_cache=True)[CACHE]
        report = handle.report(file=None)
    for index, name in enumerate(NAMES):
        real = inputs["attention_mask"][index].bool()
        expected = expected_gone(shared_model(family, "eager"), family, name, rule)
        actual = gone_in(cache, index, real)
        assert [each.tolist() for each in actual] == [each.tolist() for each in expected]
        assert report.tokens_per_layer[index].tolist() == [int((~each).sum()) for each in expected]
    assert (report.tokens_per_layer[:3, -1] < report.tokens_per_layer[:3, 0]).all()


@pytest.mark.parametrize("name", ["two images", "image last", "adjacent images"])
def test_logits_are_those_of_the_model_that_the_same_tokens_are_hidden_from(family, rule, name):
    model, eager, inputs = shared_model(family), shared_model(family, "eager"), single(family, name)
    gone = expected_gone(eager, family, name, rule)
    with vltok.apply(model, rule):
        pruned = model(**inputs).logits[0]
    with reference.hidden_keys(eager, [each[None] for each in gone]):
        expected = eager(**inputs, use_cache=False).logits[0]
    assert gone[-1].any() and not torch.allclose(eager(**inputs).logits[0, -1], expected[-1], atol=1e-3)
    assert_close(pruned[~gone[-1]], expected[~gone[-1]])


def test_a_rule_ranks_what_a_selector_let_in(family, rule):
    if isinstance(rule, vltok.DARTDecoder):
        pytest.skip("its states and keys here are those of the unpruned model")
    model, eager, inputs = shared_model(family), shared_model(family, "eager"), single(family, "two images")
    with vltok.apply(model, [vltok.DivPrune(0.5), rule]) as handle:
        output = model(**inputs, use_cache=True)
        report = handle.report(file=None)
    gone = expected_gone(eager, family, "two images", rule, report.keep_indices[0])
    actual = gone_in(output[CACHE], 0, inputs["attention_mask"][0].bool())
    assert [each.tolist() for each in actual] == [each.tolist() for each in gone]
    assert gone[0].any() and gone[-1].sum() > gone[0].sum()
    with reference.hidden_keys(eager, [each[None] for each in gone]):
        expected = eager(**inputs, use_cache=False).logits[0]
    assert_close(output.logits[0][~gone[-1]], expected[~gone[-1]])


def test_words_behind_a_prompt_see_what_stayed_with_a_cache_and_without(family, rule):
    model, inputs = shared_model(family), batch(family)
    with vltok.apply(model, rule):
        words = generate(model, inputs)
        assert torch.equal(generate(model, inputs, use_cache=False), words)
    eager = shared_model(family, "eager")
    for index, name in enumerate(NAMES):
        alone = single(family, name)
        gone = expected_gone(eager, family, name, rule)
        with reference.hidden_keys(eager, [each[None] for each in gone]):
            expected = eager(**oracle.longer(alone, words[index : index + 1], family.word_type), use_cache=False).logits
        length = alone["input_ids"].shape[1]
        scores = expected[0, length - 1 : -1].clone()
        scores[:, model.generation_config.suppress_tokens] = -torch.inf
        assert scores.argmax(-1).tolist() == words[index].tolist()


def test_a_second_turn_of_text_sees_what_stayed_of_the_first(family, rule):
    model, eager, inputs = shared_model(family), shared_model(family, "eager"), single(family, "two images")
    new = torch.tensor([[20, 21, 22, 23]])
    length = inputs["input_ids"].shape[1]
    at = row(model, family, "two images").next_position + torch.arange(4)
    at = at.expand(*((family.axes, 1) if family.axes > 1 else (1,)), -1)
    with vltok.apply(model, rule):
        cache = model(**inputs, use_cache=True)[CACHE]
        turn = model(input_ids=new, position_ids=at, **{CACHE: cache}).logits
    gone = expected_gone(eager, family, "two images", rule)
    with reference.hidden_keys(eager, [each[None] for each in gone]):
        expected = eager(**oracle.longer(inputs, new, family.word_type), use_cache=False).logits
    assert_close(turn, expected[:, length:])


@pytest.mark.parametrize("name", ["fastv", "pyramid_drop"])
def test_an_image_in_a_second_turn_is_ranked_by_its_question_which_sees_the_first(family, name):
    if family.axes > 1:
        pytest.skip("the whole conversation would need positions by hand")
    rule, model, eager = RULES[name], shared_model(family), shared_model(family, "eager")
    first, second = single(family, "two images"), single(family, "image first")
    begin, end = first["input_ids"].shape[1], first["input_ids"].shape[1] + second["input_ids"].shape[1]
    mask = torch.ones(1, end, dtype=torch.long)
    with vltok.apply(model, rule):
        cache = model(**first, use_cache=True)[CACHE]
        output = model(
            **{**second, "attention_mask": mask}, position_ids=torch.arange(begin, end)[None], **{CACHE: cache}
        )
    images = [
        tiny.picture(seed, size) for seed, size in ((0, family.other_size), (1, family.size), (0, family.other_size))
    ]
    whole = dict(family.inputs([" ".join(PROMPTS[each][0] for each in ("two images", "image first"))], images))
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    whole |= {"input_ids": ids, "attention_mask": mask}
    visual = oracle.placeholders(model, second)[0].nonzero().squeeze(1) + begin
    gone = [nn.functional.pad(each, (0, end - begin)) for each in expected_gone(eager, family, "two images", rule)]
    layers = len(gone)
    for layer in rule.layers(layers):
        score = maps_of(eager, whole, gone)[layer - 1][-1]
        state = SimpleNamespace(image_lengths=[[len(visual)]], layer=layer, num_layers=layers)
        still = visual[~gone[-1][visual]]
        leaving = still[score[still].argsort(descending=True, stable=True)[rule.budgets(state)[0][0] :]]
        for index in range(layer, layers):
            gone[index] = gone[index].index_fill(0, leaving, True)
    with reference.hidden_keys(eager, [each[None] for each in gone]):
        expected = eager(**whole, use_cache=False).logits[0, begin:]
    stay = ~gone[-1][begin:]
    assert_close(output.logits[0][stay], expected[stay])


# What a rule is shown


@dataclass(frozen=True)
class Probe(vltok.DecoderRule):
    """Drops every third visual token at each of three layers, and keeps what it was shown."""

    seen: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (1, 2, 3)

    def keep(self, state: DecoderState) -> torch.Tensor:
        count = len(state.is_visual)
        every = torch.arange(state.is_visual.shape[1]).expand(count, -1)
        names = ("layer", "is_visual", "is_text", "last", "images", "image_lengths", "grids", "coordinates", "keys")
        shown = {name: getattr(state, name) for name in names}
        self.seen.append({**shown, "maps": state.attention(every), "entry": state.entry, "mass": state.mass})
        return ~state.is_visual | (state.is_visual.cumsum(1) % 3 > 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_at_every_layer_is_what_the_eager_maps_show(family, attention):
    model, eager, inputs = shared_model(family, attention), shared_model(family, "eager"), single(family, "two images")
    probe = Probe()
    with vltok.apply(model, probe):
        model(**inputs)
    visual = oracle.placeholders(model, inputs)[0]
    gone = [torch.zeros_like(visual)] * len(eager.model.language_model.layers)
    for shown in probe.seen:
        layer, stay = shown["layer"], ~gone[-1]
        maps = maps_of(eager, inputs, gone)[layer - 1]
        torch.testing.assert_close(shown["maps"][0], maps[stay][:, stay], rtol=0, atol=1e-5)
        assert torch.equal(shown["is_visual"][0], visual[stay])
        assert torch.equal(shown["is_text"][0], (~visual & (visual.cumsum(0) > 0))[stay])
        groups = torch.stack([shown["maps"][0][:, own[0]].sum(1) for own in (shown["is_visual"], shown["is_text"])], 1)
        torch.testing.assert_close(shown["mass"][0], groups, rtol=0, atol=1e-5)
        still = visual & stay
        gone = gone[:layer] + [gone[-1] | (still & (still.cumsum(0) % 3 == 0))] * (len(gone) - layer)


@dataclass(frozen=True)
class Look(vltok.DecoderRule):
    """Keeps all tokens, and the attention it was shown at each layer."""

    depth: float = 0.5
    seen: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (layer_at(self.depth, num_layers),)

    def keep(self, state: DecoderState) -> torch.Tensor:
        every = torch.arange(state.is_visual.shape[1]).expand(len(state.is_visual), -1)
        self.seen[state.layer] = state.attention(every)
        return torch.ones_like(state.is_visual)


READABLE = [each for each in zoo.ROWS if not each.shares_keys and each is not MINIMAX_M3_VL_SPARSE]


@pytest.mark.parametrize("family", READABLE, ids=lambda family: family.key)
def test_attention_is_exact_on_every_decoder(family):
    """Caps, sinks, windows, states in between, image tokens that see what comes later: on kernels that show no map."""
    look, eager = Look(family.drop_depth), shared_model(family, "eager")
    inputs = family.inputs(["w1 w2 <image> w3 w4 w5"], [tiny.picture(0, family.size)])
    with vltok.apply(shared_model(family), look):
        shared_model(family)(**inputs)
    maps = eager(**inputs, output_attentions=True, use_cache=False).attentions
    layers = oracle.decoder_of(eager, family).layers
    attending = [number for number, layer in enumerate(layers, start=1) if hasattr(layer, "self_attn")]
    ((layer, seen),) = look.seen.items()
    own = attending.index(layer) if len(maps) < len(layers) else layer - 1
    torch.testing.assert_close(seen[0], maps[own][0].mean(0), rtol=0, atol=2e-5)


def test_images_places_and_lengths_are_told_for_every_row(family):
    model, inputs, probe = shared_model(family), batch(family), Probe()
    with vltok.apply(model, probe):
        model(**inputs)
    visual = oracle.placeholders(model, inputs)
    lengths = [[family.tokens[size] for size in PROMPTS[name][1]] for name in NAMES]
    left = visual.clone()
    for shown in probe.seen:
        assert shown["image_lengths"] == lengths
        for index, own in enumerate(lengths):
            numbers = torch.arange(len(own)).repeat_interleave(torch.tensor(own, dtype=torch.long))
            whole = torch.full(visual.shape[1:], -1)
            whole[visual[index]] = numbers
            images = shown["images"][index]
            still = left[index]
            assert images[images >= 0].tolist() == whole[still].tolist()
            for image, grid in enumerate(shown["grids"][index]):
                places = shown["coordinates"][index][images == image]
                assert places.shape == (int((whole[still] == image).sum()), 3)
                if grid is None:
                    assert (places == -1).all()
                else:
                    every = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3)
                    assert torch.equal(places, every[still[whole == image][: len(every)]])
            assert (shown["coordinates"][index][images < 0] == -1).all()
        left &= ~(left & (left.cumsum(1) % 3 == 0))


@pytest.mark.parametrize("answer", [0, 1])
def test_the_entry_and_the_last_token_are_those_of_the_prompt(family, answer):
    model, inputs, probe = shared_model(family), batch(family, "right", NAMES[1:3]), Probe()
    labels = {"labels": answered(inputs, answer)} if answer else {}
    with vltok.apply(model, probe):
        model(**inputs, **labels)
    for index, name in enumerate(NAMES[1:3]):
        whole, is_padded = row(model, family, name), bool(inputs["attention_mask"][index, -1] == 0)
        length = len(whole.embeds)
        text = ~whole.visual & (whole.visual.cumsum(0) > 0) & (torch.arange(length) < length - answer)
        for shown in probe.seen:
            entry = shown["entry"]
            begin = entry.embeddings.shape[1] - length - is_padded  # the last column is there in any case
            own = slice(begin, begin + length)
            assert_close(entry.embeddings[index, own], whole.embeds)
            assert torch.equal(entry.is_visual[index, own], whole.visual)
            assert torch.equal(entry.is_text[index, own], text)
            assert int(entry.slots[index, shown["last"][index]]) == begin + length - answer - 1
            assert entry.is_visual[index, entry.slots[index][shown["is_visual"][index]]].all()
            assert entry.is_text[index, entry.slots[index][shown["is_text"][index]]].all()


def answered(inputs: Any, count: int) -> torch.Tensor:
    """Labels of the last tokens of each row."""
    behind = inputs["attention_mask"].sum(1, keepdim=True) - inputs["attention_mask"].cumsum(1)
    return inputs["input_ids"].masked_fill((behind >= count) | (inputs["attention_mask"] == 0), -100)


def test_packed_samples_are_shown_apart(family):
    model, probe, names = shared_model(family), Probe(), NAMES[:3]
    with vltok.apply(model, probe):
        model(**packed(model, family, names), use_cache=False)
        together = probe.seen[:]
        for number, name in enumerate(names):
            probe.seen.clear()
            model(**single(family, name), use_cache=False)
            for mine, alone in zip(together, probe.seen, strict=True):
                last = mine["last"][number]
                own = (mine["maps"][number, last] > 0).nonzero().squeeze(1)
                visual = mine["is_visual"][number]
                assert int(visual.sum()) == int(alone["is_visual"].sum())
                row = alone["maps"][0, alone["last"][0]]
                torch.testing.assert_close(mine["maps"][number, last][own], row[row > 0], rtol=0, atol=1e-5)
                torch.testing.assert_close(
                    mine["keys"][number][visual], alone["keys"][0][alone["is_visual"][0]], rtol=0, atol=1e-4
                )


@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP, QWEN2_5_VL], ids=lambda family: family.key)
def test_windows_get_equal_shares_of_an_image(family):
    model, inputs = shared_model(family), single(family, "image first")
    with vltok.apply(model, vltok.FastV(num_keep=4, window=(2, 2))):
        cache = model(**inputs, use_cache=True)[CACHE]
    probe = Probe()
    with vltok.apply(model, probe):
        model(**inputs)
    (_, height, width), visual = probe.seen[0]["grids"][0][0], oracle.placeholders(model, inputs)[0]
    kept = (~gone_in(cache, 0, inputs["attention_mask"][0].bool())[-1])[visual].nonzero().squeeze(1)
    regions = [(place // width * 2 // height, place % width * 2 // width) for place in kept.tolist()]
    assert sorted(regions) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_windows_are_refused_where_tokens_form_no_grid():
    model, inputs = shared_model(INTERNVL), single(INTERNVL, "two images")
    method = vltok.FastV(num_keep=4, window=(2, 2))
    with vltok.apply(model, method), pytest.raises(ValueError, match="leave out window"):
        model(**inputs)


def test_other_knobs_for_a_block():
    model, inputs = shared_model(LLAVA), single(LLAVA, "text around")
    with vltok.apply(model, vltok.FastV(keep_ratio=0.5)) as handle:
        with handle.using(keep_ratio=0.25):
            model(**inputs)
            assert handle.report(file=None).tokens_per_layer.tolist() == [[20, 20, 8, 8]]
        model(**inputs)
        assert handle.report(file=None).tokens_per_layer.tolist() == [[20, 20, 12, 12]]
