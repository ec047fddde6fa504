"""Converted TokenPacker checkpoints compute what the official parts compute, whatever the packing and the size."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.official import (
    CLIP,
    SCALE,
    TOWER_PREFIX,
    check,
    every_weight,
    official_logits,
    official_projector,
    prompt,
    write,
)
from safetensors.torch import load_file, save_file
from tiny import IDS
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

import vltok
from vltok.convert.__main__ import app
from vltok.convert.token_packer import convert
from vltok.errors import CheckpointError

# What is computed


@pytest.mark.parametrize("packing", ["bin", "safetensors", "sharded bin", "sharded safetensors"])
@pytest.mark.parametrize("with_tower", [False, True], ids=["tower folder", "tower inside"])
def test_the_converted_model_computes_what_the_official_parts_compute(
    official, clip_folder, tmp_path, packing, with_tower
):
    source = write(tmp_path / "official", official.config, official.weights(with_tower), packing)
    if with_tower:  # a folder with the config alone
        (tmp_path / "clip").mkdir()
        (tmp_path / "clip" / "config.json").write_text((clip_folder / "config.json").read_text())
        clip_folder = tmp_path / "clip"
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    check(tmp_path / "out", official)


def without_model_prefix(name: str) -> str:
    return name.removeprefix("model.")


def with_tower_alone(name: str) -> str:
    return name.replace("model.vision_tower.vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize("rename", [without_model_prefix, with_tower_alone])
def test_other_spellings_of_the_official_names_are_understood(official, clip_folder, tmp_path, rename):
    weights = {rename(name): tensor for name, tensor in official.weights(with_tower=True).items()}
    assert weights.keys() != official.weights(with_tower=True).keys()
    source = write(tmp_path / "official", official.config, weights, "safetensors")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text((clip_folder / "config.json").read_text())
    convert(source, tmp_path / "out", vision_tower=tmp_path / "clip")
    check(tmp_path / "out", official)


@pytest.mark.parametrize("layout", ["as saved today", "as saved before", "bin"])
def test_a_tower_folder_may_hold_the_vision_half_alone(official, source, tmp_path, layout):
    folder, tower = tmp_path / "clip", CLIPVisionModel(CLIPVisionConfig(**CLIP))
    tower.load_state_dict(official.clip.vision_model.state_dict())
    tower.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if layout != "as saved today":
        weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(weights, folder / "model.safetensors")
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    convert(source, tmp_path / "out", vision_tower=folder)
    check(tmp_path / "out", official)


def test_weights_of_a_given_tower_folder_replace_those_of_the_checkpoint(official, clip_folder, tmp_path):
    weights = official.weights(with_tower=True)
    weights[f"{TOWER_PREFIX}post_layernorm.bias"] += 1
    source = write(tmp_path / "official", official.config, weights, "bin")
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    written = every_weight(tmp_path / "out")["vision_tower.post_layernorm.bias"]
    assert torch.equal(written, official.clip.vision_model.post_layernorm.bias)


def test_generation_runs_and_stops_at_the_official_end_token(converted):
    handle = vltok.from_pretrained(converted)
    inputs = prompt(handle.processor)
    output = handle.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs.input_ids.shape[1]
    generation = handle.model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (IDS["bos_token_id"], IDS["eos_token_id"])
    assert generation.pad_token_id == handle.processor.tokenizer.pad_token_id


# Size and dtype


def test_never_more_than_one_file_of_weights_is_in_memory(official, clip_folder, tmp_path, monkeypatch):
    source = write(tmp_path / "official", official.config, official.weights(), "sharded bin")
    alive: list[weakref.ref] = []
    loads: list[str] = []
    load = torch.load

    def watched(path: Path, **options: Any) -> dict[str, torch.Tensor]:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "tensors of the file before are still there"
        assert options["weights_only"] and options["mmap"]
        tensors = load(path, **options)
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        loads.append(Path(path).name)
        return tensors

    monkeypatch.setattr(torch, "load", watched)
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    assert sorted(set(loads)) == sorted(path.name for path in source.glob("*.bin"))
    assert len(loads) == 6, "each file is opened twice: for its names, and for its tensors"
    monkeypatch.undo()
    check(tmp_path / "out", official)


def test_files_are_no_larger_than_asked(official, source, clip_folder, tmp_path):
    limit = 40_000
    said = convert(source, tmp_path / "out", vision_tower=clip_folder, max_shard_bytes=limit)
    parts = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(parts) > 5
    assert [path.name for path in parts] == [
        f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))
    ]
    for part in parts:
        tensors = load_file(part)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
    assert str(tmp_path / "out") in said
    check(tmp_path / "out", official)


def test_weights_keep_their_dtype_unless_told(official, clip_folder, tmp_path):
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in official.weights().items()}
    source = write(tmp_path / "official", official.config, weights, "bin")
    convert(source, tmp_path / "kept", vision_tower=clip_folder)
    kept = every_weight(tmp_path / "kept")
    assert {tensor.dtype for name, tensor in kept.items() if name.startswith("language_model")} == {torch.bfloat16}
    assert kept["vision_tower.post_layernorm.bias"].dtype == torch.float32
    loaded = vltok.from_pretrained(tmp_path / "kept").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    convert(source, tmp_path / "told", vision_tower=clip_folder, dtype="float16")
    told = {**every_weight(tmp_path / "told"), **load_file(tmp_path / "told" / "vltok.safetensors")}
    assert {tensor.dtype for tensor in told.values()} == {torch.float16}
    assert vltok.from_pretrained(tmp_path / "told").model.dtype == torch.float16


# A projector alone


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
def test_a_projector_alone_becomes_an_adapter(official, clip_folder, converted, tmp_path, prefix, has_config):
    (source := tmp_path / "official").mkdir()
    weights = {f"{prefix}{name}": tensor for name, tensor in official.projector.items()}
    torch.save(weights, source / "mm_projector.bin")
    if has_config:
        (source / "config.json").write_text(json.dumps(official.config))
    out = tmp_path / "out"
    said = convert(source, out, vision_tower=clip_folder, scale_factor=SCALE)
    assert "vltok.load" in said
    assert sorted(path.name for path in out.iterdir()) == ["vltok.safetensors", "vltok_config.json"]
    for name in ("vltok.safetensors", "vltok_config.json"):
        assert (out / name).read_bytes() == (converted / name).read_bytes()

    handle = vltok.from_pretrained(converted)
    handle.remove()
    processor = AutoProcessor.from_pretrained(converted)
    with vltok.load(handle.model, out, processor=processor) as loaded:
        inputs = prompt(processor)
        logits = loaded.model(**inputs).logits[..., :43]
    expected = official_logits(official, inputs, processor.image_token_id)[..., :43]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_projector_alone_is_of_clip_l_336_unless_told(tmp_path):
    (source := tmp_path / "official").mkdir()
    weights = official_projector()
    torch.save(weights, source / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"q_proj_1\.weight has shape \(256, 16\), expected \(256, 1024\)"):
        convert(source, tmp_path / "out", scale_factor=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "model.embed_tokens.weight": torch.zeros(2, 2)}, r"unexpected model\.embed_tokens\.weight"),
        (lambda w: {n: t for n, t in w.items() if n != "ln_k_1.bias"}, r"missing multi_modal_projector\.ln_k_1\.bias"),
        (lambda w: {**w, "mlp.0.bias": torch.zeros(3)}, r"mlp\.0\.bias has shape \(3,\), expected \(64,\)"),
        (
            lambda w: {"model.mm_projector.0.weight": torch.zeros(2, 2)},
            r"no TokenPacker projector; it has model\.mm_pro",
        ),
        (lambda w: {**w, "q_proj_1.weight": torch.zeros(100, 16)}, "multiple of 128, a head's; got 100"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(official, clip_folder, tmp_path, change, message):
    (source := tmp_path / "official").mkdir()
    torch.save(change(official.projector), source / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", vision_tower=clip_folder, scale_factor=SCALE)
    assert not (tmp_path / "out").exists()


# The command


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_converts_and_says_what_it_made(official, clip_folder, tmp_path):
    config = {**official.config, "patch_num": "16", "mm_use_im_start_end": True}
    source = write(tmp_path / "official", config, official.weights(), "sharded bin")
    done = command("tokenpacker", source, tmp_path / "out", "--vision-tower", clip_folder, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "16 patches of a picture become 4 visual tokens" in done.stdout
    assert "TokenPackerHDProcessor(processor, max_tiles=16)" in done.stdout
    assert "<im_start>" in done.stdout
    assert "converting: 100%" in done.stderr
    assert vltok.from_pretrained(tmp_path / "out").model.dtype == torch.bfloat16


def test_the_command_fails_with_one_line(source, tmp_path):
    done = command("tokenpacker", source, tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: the weights of the vision tower")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("prelude", "code", "message"),
    [
        ("sys.argv = ['convert', '--help']", 0, "tokenpacker"),
        ("sys.modules['typer'] = None", 1, "needs typer: python -m pip install"),
    ],
    ids=["help", "no typer"],
)
def test_the_command_starts_without_transformers_and_says_what_is_missing(prelude, code, message):
    program = f"import sys, runpy; {prelude}; runpy.run_module('vltok.convert', run_name='__main__')"
    program = f"import sys; sys.modules['transformers'] = None; {program}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
