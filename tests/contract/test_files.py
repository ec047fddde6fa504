"""What is saved comes back, for every method on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import PROMPTS, batch, logits, pictures, saved_files
from rows import only_pruning, only_trained

import vltok


@only_pruning
def test_saving_the_base_model_is_unaffected(pair, model, tmp_path):
    with pair.apply(model):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved_files(pair.family)


def test_a_saved_method_comes_back_equal(pair, model, tmp_path):
    with pair.apply(model) as saved:
        expected = logits(model, batch(pair))
        vltok.save(saved, tmp_path)
    with vltok.load(model, tmp_path, processor=pair.family.processor()) as handle:
        assert handle.methods == saved.methods
        assert not pair.prunes or handle.methods == (pair.method,)
        assert torch.equal(logits(model, batch(pair)), expected)


@only_trained
def test_a_checkpoint_with_new_weights_loads_with_vltok_and_not_without(pair, model, tmp_path):
    with pair.apply(model) as handle:
        expected = logits(model, batch(pair))
        model.save_pretrained(tmp_path)
        handle.processor.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"vltok\.from_pretrained"):
        type(model).from_pretrained(tmp_path)
    loaded = vltok.from_pretrained(tmp_path)
    assert loaded.methods == handle.methods
    inputs = pair.family.inputs(PROMPTS, pictures(pair.family), processor=loaded.processor)
    assert torch.equal(logits(loaded.model, inputs), expected)
    loaded.remove()
    config, expected = loaded.model.config.to_dict(), model.config.to_dict()
    fields = config.keys() - {"_name_or_path", "dtype", "text_config", "vision_config"}
    assert {name: config[name] for name in fields} == {name: expected[name] for name in fields}
    assert config["vision_config"] | {"dtype": "float32"} == expected["vision_config"] | {"dtype": "float32"}


@only_trained
def test_new_weights_take_dtype_and_mode_of_their_place(pair, model):
    half = copy.deepcopy(model).to(torch.bfloat16).train()
    with pair.apply(half) as handle:
        for module in handle.added_modules:
            assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
            assert module.training
