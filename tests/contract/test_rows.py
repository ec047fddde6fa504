"""A row of a batch is answered as if it were alone, whatever stands around it, for every method on every family."""

from __future__ import annotations

import functools

import pytest
import torch
from calls import ALONE, PROMPTS, batch, generate, logits, positions, promise, single
from oracle import counts_slots, decoder_of
from prompts import TOKENS, hide
from reference import assert_close
from rows import dropping_too, only_pruning_dropping_too
from tiny import shared_model

import vltok

LONGEST = 1  # of the prompts
WORDS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@dropping_too
def test_text_only_prompts_pass_through_unchanged(pair, model):
    inputs = pair.family.inputs(["w1 w2 w3", "w4"])
    expected = generate(model, inputs), logits(model, inputs)
    with pair.apply(model):
        assert torch.equal(generate(model, inputs), expected[0])
        assert torch.equal(logits(model, inputs), expected[1])


@dropping_too
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(pair, model, side):
    promise("rows", functools.partial(rows_equal_rows_alone, side=side), pair, model)


def rows_equal_rows_alone(pair, model, side):
    inputs = hide(batch(pair, "right" if side == "right" else "left"), right=2 * (side == "both"))
    real = inputs["attention_mask"].bool()
    with pair.apply(model) as handle:
        together = logits(model, inputs)
        report = handle.report(file=None) if pair.prunes else None
        for row in range(len(PROMPTS)):
            alone = logits(model, single(pair, row))
            assert_close(together[row][real[row]], alone[0])
            if row in ALONE and pair.prunes:
                mine = handle.report(file=None)
                assert mine.kept_tokens == [report.kept_tokens[row]]
                for a, b in zip(mine.keep_indices[0], report.keep_indices[row], strict=True):
                    assert torch.equal(a, b)
                assert torch.equal(mine.tokens_per_layer[0], report.tokens_per_layer[row])


@dropping_too
def test_generation_of_a_row_does_not_depend_on_the_batch(pair, model):
    promise("rows", words_equal_words_alone, pair, model)


def words_equal_words_alone(pair, model):
    options = {"output_logits": True, "return_dict_in_generate": True}
    with pair.apply(model):
        together = model.generate(**batch(pair), **WORDS, **options)
        for row in range(len(PROMPTS)):
            alone = model.generate(**single(pair, row), **WORDS, **options)
            assert torch.equal(together.sequences[row, -5:], alone.sequences[0, -5:])
            assert_close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@dropping_too
def test_a_row_of_padding_alone_disturbs_nobody(pair, model):
    inputs = dict(batch(pair))
    names = [name for name in TOKENS if name in inputs]
    wider = inputs | {name: torch.cat([inputs[name], torch.zeros_like(inputs[name][:1])]) for name in names}
    real = inputs["attention_mask"].bool()
    wider["position_ids"] = (wider["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(*pair.axes, -1, -1)
    inputs["position_ids"] = wider["position_ids"][..., :-1, :]
    with pair.apply(model):
        together = logits(model, wider)
        assert_close(together[:-1][real], logits(model, inputs)[real])
    assert together.isfinite().all()


@dropping_too
def test_right_padding_generates_as_the_unpruned_model_does_where_all_is_kept(pair, model):
    """The words of a row that ends in padding mean nothing, but the longest row's do."""
    with pair.apply(model):
        answer = generate(model, batch(pair, "right"))
        assert torch.equal(answer[LONGEST], generate(model, single(pair, LONGEST))[0])
    same = [LONGEST] if counts_slots(decoder_of(model, pair.family)) else slice(None)
    if pair.prunes:
        expected = generate(model, batch(pair, "right"))
        with vltok.apply(model, vltok.StrideTokens(keep_ratio=1.0)):
            assert torch.equal(generate(model, batch(pair, "right"))[same], expected[same])


@only_pruning_dropping_too
def test_a_ready_made_mask_hides_what_the_flat_one_hides(pair, model):
    """A mask of four dimensions says who sees whom; here it says what transformers makes of the flat one."""
    promise("ready-made masks", maps_do_what_flat_masks_do, pair, model)


def maps_do_what_flat_masks_do(pair, model):
    inputs = dict(single(pair, 1))
    inputs["position_ids"] = positions(model, inputs).view(*pair.axes, 1, -1)
    maps = made_masks(pair.family, inputs)
    with pair.apply(model):
        expected = logits(model, inputs, use_cache=False)
        assert_close(logits(model, {**inputs, "attention_mask": maps}, use_cache=False), expected)


def made_masks(family, inputs) -> torch.Tensor | dict[str, torch.Tensor]:
    """Who sees whom in the layers of an eager decoder, (1, 1, T, T), bool; by kind of layer if there are several."""
    eager, masks = shared_model(family, "eager"), {}
    decoder = decoder_of(eager, family)
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)

    def see(kind: str, layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs["attention_mask"]
        masks[kind] = mask if mask is None or mask.dtype == torch.bool else mask == 0

    hooks = [
        layer.register_forward_pre_hook(functools.partial(see, kind), with_kwargs=True)
        for kind, layer in zip(kinds, decoder.layers, strict=True)
    ]
    logits(eager, inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return masks if len(masks) > 1 else next(iter(masks.values()))
