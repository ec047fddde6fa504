"""What a run writes holds all that was trained and no more, is usable as it is, and lets the run go on exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import LLAVA, LLAVA_NEXT, QWEN2_5_VL
from train.runs import losses, make, outputs, weights
from transformers import AutoModelForImageTextToText

import vltok
from vltok.errors import CheckpointError

STRIDE = vltok.StrideTokens(num_keep=4)
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
CASES = {
    "only added": {},
    "in full": {"parts": "projector+llm"},
    "lora": {"parts": "projector+llm", "lora": 4},
    "nothing added": {"parts": "projector+llm", "method": STRIDE, "family": QWEN2_5_VL},
    "nothing added, lora": {"parts": "llm", "lora": 4, "method": STRIDE},
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_exactly_as_if_it_had_not_stopped(tmp_path, folder, case):
    whole = make(tmp_path / "whole", folder, **CASES[case])
    whole.train()
    second = make(tmp_path / "again", folder, **CASES[case])
    with torch.no_grad():  # what comes back comes from the checkpoint
        for parameter in second.weights.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    second.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert len(losses(second)) == 6
    assert losses(second) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name


def test_true_resumes_the_last_checkpoint(tmp_path, folder):
    make(tmp_path, folder, max_steps=3).train()
    trainer = make(tmp_path, folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert len(losses(trainer)) == 6


@pytest.mark.parametrize(("family", "scale"), [(LLAVA, 2), (LLAVA_NEXT, 3)])
def test_checkpoints_hold_only_what_was_added_where_nothing_else_trains(tmp_path, folder, family, scale):
    trainer = make(tmp_path, folder, family=family, method=vltok.TokenPacker(scale_factor=scale))
    trainer.train()
    added = {"adapter/vltok_config.json", "adapter/vltok.safetensors"}
    assert files(tmp_path / "checkpoint-3") == added | STATE
    names = {f"multi_modal_projector.{name}" for name in trainer.handle.added_modules[0].state_dict()}
    assert load_file(tmp_path / "checkpoint-6/adapter/vltok.safetensors").keys() == names
    trainer.save_model(str(tmp_path / "out"))
    assert files(tmp_path / "out") == added | {"log_history.json"}
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    assert [entry["loss"] for entry in history if "loss" in entry] == losses(trainer)


@pytest.mark.parametrize("place", ["checkpoint-6", "out"])
def test_what_was_added_is_loaded_with_vltok_load(tmp_path, folder, place):
    trainer = make(tmp_path, folder)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    handle = vltok.load(LLAVA.model(), tmp_path / place / "adapter", processor=LLAVA.processor())
    assert torch.equal(outputs(handle), outputs(trainer.handle))


@pytest.mark.parametrize("place", ["checkpoint-6", "out"])
def test_a_model_that_trained_with_its_new_projector_is_loaded_with_vltok_from_pretrained(tmp_path, folder, place):
    trainer = make(tmp_path, folder, parts="projector+llm")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    handle = vltok.from_pretrained(tmp_path / place / "model")
    assert torch.equal(outputs(handle), outputs(trainer.handle))
    assert handle.model.config.text_config.use_cache


def test_a_model_that_trained_pruned_is_loaded_with_transformers_and_its_method_with_vltok(tmp_path, folder):
    trainer = make(tmp_path, folder, parts="llm", method=STRIDE)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/model")
    handle = vltok.load(model, tmp_path / "out/adapter", processor=LLAVA.processor())
    assert handle.methods == (STRIDE,)
    assert torch.equal(outputs(handle), outputs(trainer.handle))


@pytest.mark.parametrize("case", ["lora", "nothing added, lora"])
def test_lora_is_loaded_with_peft_on_top_of_the_method(tmp_path, folder, case):
    trainer = make(tmp_path, folder, **CASES[case])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    names = load_file(tmp_path / "out/model/adapter_model.safetensors")
    assert names and all("language_model" in name and "lora_" in name for name in names)
    handle = vltok.load(LLAVA.model(), tmp_path / "out/adapter", processor=LLAVA.processor())
    before = outputs(handle)
    PeftModel.from_pretrained(handle.model, tmp_path / "out/model")
    assert torch.equal(outputs(handle), outputs(trainer.handle))
    assert not torch.equal(before, outputs(handle))


def test_weights_are_taken_from_a_gathered_state_where_one_is_given(tmp_path, folder):
    for case in ("only added", "in full", "lora"):
        trainer = make(tmp_path / case, folder, **CASES[case])
        state = {name: tensor + 1 for name, tensor in trainer.model.state_dict().items()}
        trainer._save(str(tmp_path / case), state)
        trainer.weights.load(tmp_path / case)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter, state[name])


def test_a_checkpoint_of_other_parts_methods_or_sizes_is_refused(tmp_path, folder):
    make(tmp_path / "added", folder, max_steps=3).train()
    make(tmp_path / "full", folder, max_steps=3, parts="projector+llm").train()
    added, full = tmp_path / "added/checkpoint-3", tmp_path / "full/checkpoint-3"
    with pytest.raises(CheckpointError, match="nothing but what the methods added"):
        make(tmp_path / "x", folder, parts="projector+llm").train(resume_from_checkpoint=str(added))
    with pytest.raises(CheckpointError, match="more than what the methods added"):
        make(tmp_path / "x", folder).train(resume_from_checkpoint=str(full))
    with pytest.raises(CheckpointError, match="doesn't fit: missing"):
        make(tmp_path / "x", folder, parts="projector+llm", lora=2).train(resume_from_checkpoint=str(full))
    other = make(tmp_path / "x", folder, method=vltok.TokenPacker(scale_factor=2, embed_dim=64))
    with pytest.raises(CheckpointError, match="has shape"):
        other.train(resume_from_checkpoint=str(added))
    (added / "adapter/vltok.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        make(tmp_path / "x", folder).train(resume_from_checkpoint=str(added))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, float("nan")], ids=str)
@pytest.mark.parametrize("file", ["adapter/vltok.safetensors", "model/adapter_model.safetensors"])
def test_a_checkpoint_with_weights_of_another_kind_is_refused_whole(tmp_path, folder, file, kind):
    trainer = make(tmp_path, folder, **CASES["lora"])
    trainer.weights.save(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):  # a load that stopped half-way would show
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    saved = load_file(tmp_path / file)
    name = max(saved)
    bad = saved[name] * kind if isinstance(kind, float) else saved[name].to(kind)
    save_file({**saved, name: bad}, tmp_path / file)
    before = weights(trainer)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        trainer.weights.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
