"""A row of a batch is answered as if it were alone, whatever stands around it, for every method on every family."""

from __future__ import annotations

import pytest
import reference
import torch
from calls import ALONE, PROMPTS, TOLERANCE, batch, generate, logits, positions, single
from prompts import hide
from rows import only_pruning

import vltok


def test_text_only_prompts_pass_through_unchanged(pair, model):
    inputs = pair.family.inputs(["w1 w2 w3", "w4"])
    expected = generate(model, inputs), logits(model, inputs)
    with pair.apply(model):
        assert torch.equal(generate(model, inputs), expected[0])
        assert torch.equal(logits(model, inputs), expected[1])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(pair, model, side):
    inputs = hide(batch(pair, "right" if side == "right" else "left"), right=2 * (side == "both"))
    real = inputs["attention_mask"].bool()
    with pair.apply(model) as handle:
        together = logits(model, inputs)
        report = handle.report(file=None)
        for row in range(len(PROMPTS)):
            alone = logits(model, single(pair, row))
            torch.testing.assert_close(together[row][real[row]], alone[0], **TOLERANCE)
            if row in ALONE and pair.prunes:
                mine = handle.report(file=None)
                assert mine.kept_tokens == [report.kept_tokens[row]]
                for a, b in zip(mine.keep_indices[0], report.keep_indices[row], strict=True):
                    assert torch.equal(a, b)
                assert torch.equal(mine.tokens_per_layer[0], report.tokens_per_layer[row])


def test_generation_of_a_row_does_not_depend_on_the_batch(pair, model):
    with pair.apply(model):
        together = generate(model, batch(pair))
        for row in range(len(PROMPTS)):
            assert torch.equal(together[row], generate(model, single(pair, row))[0])


def test_a_row_of_padding_alone_disturbs_nobody(pair, model):
    inputs = dict(batch(pair))
    names = [name for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs]
    wider = inputs | {name: torch.cat([inputs[name], torch.zeros_like(inputs[name][:1])]) for name in names}
    real = inputs["attention_mask"].bool()
    wider["position_ids"] = (wider["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(*pair.axes, -1, -1)
    inputs["position_ids"] = wider["position_ids"][..., :-1, :]
    with pair.apply(model):
        together = logits(model, wider)
        torch.testing.assert_close(together[:-1][real], logits(model, inputs)[real], **TOLERANCE)
    assert together.isfinite().all()


def test_right_padding_generates_as_the_unpruned_model_does_where_all_is_kept(pair, model):
    """The words of a row that ends in padding mean nothing, but the longest row's do."""
    longest = 1
    with pair.apply(model):
        answer = generate(model, batch(pair, "right"))
        assert torch.equal(answer[longest], generate(model, single(pair, longest))[0])
    if pair.prunes:
        expected = generate(model, batch(pair, "right"))
        with vltok.apply(model, vltok.StrideTokens(keep_ratio=1.0)):
            assert torch.equal(generate(model, batch(pair, "right")), expected)


@only_pruning
def test_a_ready_made_mask_hides_what_the_flat_one_hides(pair, model):
    """A mask of four dimensions says who sees whom; here it says what transformers makes of the flat one."""
    inputs = dict(single(pair, 1))
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = positions(model, inputs)
    inputs["position_ids"] = inputs["position_ids"].view(*pair.axes, 1, length)
    masks = {}
    for kind, size in set(reference.windows(model.model.language_model)):
        seen = reference.in_window(kind, size, torch.arange(length)).tril()
        masks[f"{kind}_attention"] = seen[None, None]
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    with pair.apply(model):
        expected = logits(model, inputs, use_cache=False)
        got = logits(model, {**inputs, "attention_mask": mask}, use_cache=False)
    torch.testing.assert_close(got, expected, **TOLERANCE)
