"""transformers' common model tests for every family of the matrix; run.py runs this file with and without a selector.

Not collected with the suite: the tests come from transformers' source distribution, which run.py fetches.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any

import tiny
from tests.generation.test_utils import GenerationTesterMixin  # transformers' tests, not these
from tests.test_modeling_common import ModelTesterMixin

ROWS = 3


class Tester:
    """What transformers' tests ask about a model: a config of two layers, a batch of three prompts, and its sizes."""

    is_training = True
    batch_size = ROWS

    def __init__(self, family: tiny.TinyFamily) -> None:
        self.config = copy.deepcopy(family.build("sdpa").config)
        text, tower = self.config.text_config, self.config.vision_config
        text.num_hidden_layers = 2
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:2]
        if hasattr(tower, "depth"):
            tower.depth, tower.fullatt_block_indexes = 2, [1]
        else:
            tower.num_hidden_layers = 2
        pictures = [tiny.picture(seed, family.size) for seed in range(ROWS)]
        self.inputs = dict(family.inputs([f"w{row} <image> w7 w8" for row in range(ROWS)], pictures))
        self.num_hidden_layers = text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.hidden_size = text.hidden_size
        self.seq_length = self.inputs["input_ids"].shape[1]

    def get_config(self) -> Any:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return copy.deepcopy(self.config), copy.deepcopy(self.inputs)


def _tests(family: tiny.TinyFamily) -> type[unittest.TestCase]:
    model = family.build("sdpa")

    def setup(self: Any) -> None:
        self.model_tester = Tester(family)

    kind = "cls" if family.has_cls else "no_cls"
    fields = {"all_model_classes": (type(model.model), type(model)), "_is_composite": True, "setUp": setup}
    bases = (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase)
    return type(f"Test_{family.name}_{kind}", bases, fields)


globals().update({test.__name__: test for test in map(_tests, tiny.ALL)})
