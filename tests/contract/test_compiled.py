"""torch.compile of a part of the model changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import batch, generate, logits
from matrix import SELECTING
from reference import assert_close
from rows import only

# Two kinds of positions, and windows. Compiling takes seconds.
PAIRS = {name: SELECTING[name] for name in ("llava-cls-todre", "qwen2_5_vl-no-cls-todre", "llava-sliding-cls-todre")}


@only(PAIRS)
@pytest.mark.parametrize("part", ["language model", "layers"])
def test_a_compiled_decoder_changes_nothing(pair, model, part):
    check(pair, model, part)


@only({"llava-cls-todre": SELECTING["llava-cls-todre"]})
def test_a_compiled_vision_tower_changes_nothing(pair, model):
    check(pair, model, "vision tower")


def check(pair, model, part):
    """Compare a model one part of which is compiled with the same model."""
    inputs, host = batch(pair), copy.deepcopy(model)
    with pair.apply(model):
        expected, words = logits(model, inputs), generate(model, inputs, steps=2)
    tower = getattr(host.model, "vision_tower", None) or host.model.visual
    modules = {"language model": [host.model.language_model], "vision tower": [tower]}
    modules["layers"] = host.model.language_model.layers
    torch._dynamo.reset()
    with pair.apply(host):
        for module in modules[part]:
            module.compile(backend="eager")
        assert_close(logits(host, inputs), expected)
        assert torch.equal(generate(host, inputs, steps=2), words)
    torch._dynamo.reset()
