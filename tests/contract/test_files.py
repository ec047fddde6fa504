"""What is saved comes back, for every method on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import PROMPTS, batch, logits, pictures, saved_files
from peft import LoraConfig, get_peft_model
from reference import assert_close
from rows import only_trained, only_weightless

import vltok


@only_weightless
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


@only_trained
def test_weights_that_an_adapter_trained_in_a_copy_are_the_ones_saved(pair, model, tmp_path):
    host, inputs = copy.deepcopy(model), batch(pair)
    handle = pair.apply(host)
    names = [name for name, module in host.model.named_modules() if module in handle.added_modules]
    part = names[0].split(".")[0]
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=[part])
    adapted = get_peft_model(host, config).eval()
    with torch.no_grad():
        for name in names:
            trained = host.model.get_submodule(".".join([part, "modules_to_save", "default", *name.split(".")[1:]]))
            for weight in trained.parameters():
                weight.mul_(1.2)
    expected = logits(adapted, inputs)
    vltok.save(handle, tmp_path)
    with pair.apply(model):
        assert not torch.equal(logits(model, inputs), expected)
    with vltok.load(model, tmp_path, processor=pair.family.processor()):
        assert_close(logits(model, inputs), expected)
