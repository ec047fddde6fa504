"""The command line trains, goes on, and says in a line what is wrong; the commands of two processes equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, QWEN2_5_VL
from train.records import record, write
from train.runs import outputs
from train.templates import CHATS
from typer.testing import CliRunner

import vltok
from vltok.errors import CheckpointError
from vltok.processing import TokenPackerHDProcessor
from vltok.train.cli import app, crops

ROOT = Path(__file__).parents[2]
PACKER = ("--method", "tokenpacker,scale_factor=2,init=pool")
SHORT = ("--per-device-batch", "2", "--grad-accum", "1", "--max-steps", "4", "--save-steps", "2", "--lr", "0.003")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    LLAVA.model().save_pretrained(path)
    LLAVA.processor().save_pretrained(path)
    return path


@pytest.fixture
def run(saved, folder):
    """Run the command on the saved model and the folder's data, and return its output."""

    def run(*arguments: object, model: Path = saved, data: Path = folder.file, fails: bool = False) -> str:
        command = ["--model", model, "--data", data, *arguments]
        result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
        assert (result.exit_code != 0) == fails, result.output
        return result.output

    return run


def curve(out: Path) -> list[float]:
    history = json.loads((out / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def caption(folder, path: Path) -> Path:
    """The same pictures, each with one question and its answer."""
    rows = [record(f"c{i}", [f"{i}.png"], "<image>\nw1", f"w{i} w{i + 1}") for i in range(8)]
    return write(path / "captions.json", rows)


def test_help_explains_every_option_in_its_group():
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["--help"])
    assert result.exit_code == 0
    for group in ("Model", "Data", "Training", "Run"):
        assert f"─ {group} " in result.output
    (command,) = app.registered_commands
    for name in command.callback.__annotations__.keys() - {"return"}:
        assert f"--{name.replace('_', '-')}" in result.output


def test_a_projector_for_several_scale_factors_is_trained_by_its_text(run, folder, tmp_path):
    method, out = "tokenpacker,scale_factor=(2,4),init=pool", tmp_path / "out"
    data = caption(folder, tmp_path)
    printed = run("--method", method, *SHORT, "--images", folder.path, "--out", out, data=data)
    assert "TokenPacker(scale_factor=(2, 4)" in printed
    assert len(curve(out)) == 4
    with vltok.load(LLAVA.model(), out / "adapter", processor=LLAVA.processor()) as handle:
        assert handle.methods[0].scale_factor == (2, 4)


def test_both_stages_run_one_after_the_other_and_the_result_loads(run, folder, saved, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    images = ("--images", folder.path)
    printed = run(*PACKER, *SHORT, *images, "--out", first, data=caption(folder, tmp_path))
    assert "TokenPacker(scale_factor=2" in printed
    assert "train (projector), on 8 samples, 2 x 1 x 1 of them per step" in printed
    assert {path.name for path in first.iterdir()} == {"adapter", "checkpoint-2", "checkpoint-4", "log_history.json"}
    assert len(curve(first)) == 4

    evaluate = ("--eval-data", folder.file, "--eval-steps", 2)
    run("--method", first / "adapter", "--recipe", "finetune", *SHORT, *evaluate, "--out", second)
    history = json.loads((second / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "eval_answer_accuracy" in entry] == [2, 4]
    handle = vltok.from_pretrained(second / "model")
    added = vltok.load(LLAVA.model(), second / "adapter", processor=LLAVA.processor())
    for one, other in zip(handle.added_modules, added.added_modules, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(outputs(handle), outputs(added)), "the language model trained too"

    run("--recipe", "finetune", *SHORT, "--out", tmp_path / "third", model=second / "model")
    assert curve(tmp_path / "third")[0] < curve(second)[0]


def test_resume_goes_on_from_the_last_checkpoint(run, tmp_path):
    out = tmp_path / "out"
    settings = (*PACKER, *SHORT, "--style", "vicuna", "--out", out)
    run(*settings)
    whole = curve(out)
    (out / "checkpoint-4").rename(tmp_path / "elsewhere")
    state = out / "checkpoint-2/trainer_state.json"
    text = state.read_text()
    state.write_text(text.replace(str(whole[0]), "123.0"))  # a run from the start would not know this
    run(*settings, "--resume")
    assert curve(out) == [123.0, *whole[1:]]


def test_lora_leaves_a_peft_adapter_beside_the_methods(run, tmp_path):
    lora = ("--train", "projector+lora", "--lora-r", 2, "--lora-targets", "q_proj,v_proj")
    run(*PACKER, *SHORT, *lora, "--style", "vicuna", "--out", tmp_path)
    handle = vltok.load(LLAVA.model(), tmp_path / "adapter", processor=LLAVA.processor())
    before = outputs(handle)
    PeftModel.from_pretrained(handle.model, tmp_path / "model")
    assert not torch.equal(outputs(handle), before)


def test_pruned_models_train_in_bfloat16_with_masters_of_float32(run, tmp_path):
    method = ("--method", "stride,num_keep=4", "--train", "llm", "--dtype", "bfloat16")
    run(*method, *SHORT, "--recipe", "finetune", "--out", tmp_path)
    state = load_file(tmp_path / "model/model.safetensors")
    trained = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert trained.keys() == {name for name in state if "language_model" in name or "lm_head" in name}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert curve(tmp_path)[-1] < curve(tmp_path)[0]


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat.family.name)
def test_any_family_trains_by_lora_under_pruning_and_loads_again(chat, folder, tmp_path):
    """As one is told to on the command line; then the same weights come out of the files."""
    chat.model().save_pretrained(tmp_path / "model")
    chat.processor().save_pretrained(tmp_path / "model")
    command = ["--model", tmp_path / "model", "--data", folder.file, "--method", "divprune,keep_ratio=0.25", *SHORT]
    command += ["--recipe", "finetune", "--train", "lora", "--lora-r", 2, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"style chat, answers by {chat.answers_by}" in result.output
    assert len(curve(tmp_path / "out")) == 4
    handle = vltok.load(chat.model(), tmp_path / "out/adapter")
    assert handle.methods == (vltok.DivPrune(keep_ratio=0.25),)
    before = outputs(handle, chat.family, chat.processor())
    PeftModel.from_pretrained(handle.model, tmp_path / "out/model")
    assert not torch.equal(outputs(handle, chat.family, chat.processor()), before)


def test_images_are_padded_to_squares_by_default_only_where_they_would_be_cropped():
    large = LLAVA.processor()
    assert crops(large)
    assert not any(crops(family.processor()) for family in (LLAVA_NEXT, QWEN2_5_VL, INTERNVL))
    with vltok.apply(LLAVA.model(), vltok.TokenPacker(scale_factor=2), processor=large):
        large.tokenizer.add_tokens([",", "\n"])
        assert not crops(TokenPackerHDProcessor(large, max_tiles=9))


def test_tiles_of_large_pictures_are_trained_on_and_their_processor_is_saved(folder, tmp_path):
    model, processor = LLAVA.model(), LLAVA.processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["--model", tmp_path / "model", "--data", folder.file, *PACKER, *SHORT, "--hd", 9, "--style", "vicuna"]
    result = CliRunner().invoke(app, list(map(str, [*command, "--out", tmp_path / "out"])), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    handle = vltok.load(model, tmp_path / "out/adapter", processor=processor)
    found = TokenPackerHDProcessor.from_pretrained(tmp_path / "out/processor", processor=handle.processor)
    assert (found.max_tiles, found.processor) == (9, processor)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("tokenpacker,scale_factor=2,init=pool", vltok.TokenPacker(scale_factor=2, init="pool")),
        ("tokenpacker,levels=(1,2), scale_factor=2", vltok.TokenPacker(levels=(1, 2))),
        ("todre,keep_ratio=0.1,stages=(1,),relevance=False", vltok.ToDRE(keep_ratio=0.1, stages=(1,), relevance=False)),
        (json.dumps(vltok.StrideTokens(num_keep=3).to_dict()), vltok.StrideTokens(num_keep=3)),
    ],
)
def test_methods_are_read_as_the_command_line_names_them(text, method):
    assert vltok.Method.from_text(text) == method


def test_a_method_that_cannot_be_read_says_what_is_known():
    with pytest.raises(CheckpointError, match=r"unknown method 'packer'.*tokenpacker"):
        vltok.Method.from_text("packer")
    with pytest.raises(CheckpointError, match="unknown field 'scale'"):
        vltok.Method.from_text("tokenpacker,scale=2")
    with pytest.raises(ValueError, match="key=value, got 'pool'"):
        vltok.Method.from_text("tokenpacker,pool")


def test_mistakes_are_told_in_a_line(run, folder, saved, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "give a method" in run(*out, fails=True)
    assert "is not here: give the folder of a model" in run(*PACKER, *out, model=tmp_path / "no", fails=True)
    assert "must be parts out of" in run(*PACKER, *out, "--train", "all", fails=True)
    assert "LoRA settings are for --train lora" in run(*PACKER, *out, "--lora-r", 2, fails=True)
    assert "global batch of 256" in run(*PACKER, *out, "--per-device-batch", 24, fails=True)
    assert "no checkpoint in" in run(*PACKER, *out, "--resume", fails=True)
    assert "unknown method" in run("--method", "no", *out, fails=True)
    (tmp_path / "data.json").write_text("[{")
    assert "is not a JSON file" in run(*PACKER, *out, data=tmp_path / "data.json", fails=True)
    assert "no such file" in run(*PACKER, *out, data=tmp_path / "missing.json", fails=True).lower()
    vltok.save(vltok.apply(LLAVA.model(), vltok.StrideTokens(num_keep=4)), tmp_path / "adapter")
    assert "no other --method" in run("--method", tmp_path / "adapter", *PACKER, *out, fails=True)
    assert all(not line.startswith("Traceback") for line in run(*out, fails=True).splitlines())


@pytest.mark.parametrize("arguments", [[], ["--download"]], ids=["by default", "when asked"])
def test_nothing_is_downloaded_unless_asked(run, monkeypatch, tmp_path, arguments):
    asked = []

    def load(name: str, *, local_files_only: bool) -> None:
        asked.append(local_files_only)
        raise OSError

    monkeypatch.setattr("vltok.train.cli.AutoConfig.from_pretrained", load)
    run(*PACKER, *arguments, "--out", tmp_path, model=Path("somebody/model"), fails=True)
    assert asked == ([False] if arguments else [])


def test_two_processes_train_like_one_with_the_doubled_batch(run, folder, saved, tmp_path):
    """A batch of one process may have no pictures at all; its answers count like all others."""
    rows = [*folder.records[:5], *(record(f"t{i}", [], f"w{i}", "w1 w2 w3") for i in range(3))]
    data = write(tmp_path / "data.json", rows)
    settings = [*PACKER, "--train", "projector+llm", "--style", "vicuna", "--lr", "0.003", "--grad-accum", "1"]
    settings += ["--max-steps", "6", "--save-steps", "3", "--eval-data", data, "--images", folder.path]
    run(*settings, "--per-device-batch", 2, "--out", tmp_path / "one", data=data)

    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "vltok.train", "--model", saved, "--data", data, *settings]
    command += ["--per-device-batch", "1", "--out", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 x 2 x 1 of them per step") == 1

    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 6 and one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-4)
    evaluated = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("one", "two")]
    found = [[e["eval_loss"] for e in history if "eval_loss" in e] for history in evaluated]
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    handles = [vltok.from_pretrained(tmp_path / name / "model") for name in ("one", "two")]
    torch.testing.assert_close(outputs(handles[0]), outputs(handles[1]), rtol=1e-3, atol=1e-3)
