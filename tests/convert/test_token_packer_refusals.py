"""Checkpoints and options that can't be converted are refused with a reason, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.official import CLIP, SCALE, check, refused, write
from safetensors.torch import load_file, save_file

from vltok import convert as shared
from vltok.convert.token_packer import convert
from vltok.errors import CheckpointError


def test_a_missing_tower_says_what_to_give(official, source, tmp_path):
    refused(source, tmp_path / "out", FileNotFoundError, r"clip-vit-large-patch14-336\).*--vision-tower DIR")
    (empty := tmp_path / "empty").mkdir()
    refused(source, tmp_path / "out", FileNotFoundError, "nor in .*empty", vision_tower=empty)
    refused(source, tmp_path / "out", FileNotFoundError, "nothing is downloaded", vision_tower=tmp_path / "nowhere")


def test_a_tower_inside_that_nothing_describes_is_refused(official, tmp_path):
    config = {**official.config, "mm_vision_tower": "/data/my-clip"}
    source = write(tmp_path / "official", config, official.weights(with_tower=True), "bin")
    refused(source, tmp_path / "out", ValueError, r"my-clip.*nothing describes it.*--vision-tower DIR")


def test_a_tower_inside_named_clip_l_336_must_be_one(official, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(with_tower=True), "bin")
    message = r"class_embedding has shape \(16,\), expected \(1024,\)"
    refused(source, tmp_path / "out", CheckpointError, message)


def test_a_tower_folder_is_not_filled_up_from_the_checkpoint(official, clip_folder, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(with_tower=True), "bin")
    (folder := tmp_path / "clip").mkdir()
    (folder / "config.json").write_text((clip_folder / "config.json").read_text())
    weights = load_file(clip_folder / "model.safetensors")
    del weights["vision_model.post_layernorm.bias"]
    save_file({**weights, "vision_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    message = r"missing vision_tower\.post_layernorm\.bias; unexpected vision_head\.weight$"
    refused(source, tmp_path / "out", CheckpointError, message, vision_tower=folder)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "siglip"}, ValueError, "'clip' or 'clip_vision_model'.*'siglip'"),
        ({"model_type": "clip_vision_model", **CLIP, "num_hidden_layers": 12}, ValueError, "24 layers; .* has 12"),
        ([], CheckpointError, "must hold a JSON object, got a list"),
        (None, FileNotFoundError, r"no config\.json; give the folder of a CLIPModel"),
    ],
)
def test_another_tower_is_refused(source, clip_folder, tmp_path, config, error, message):
    (folder := tmp_path / "clip").mkdir()
    (folder / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", error, message, vision_tower=folder)


def test_missing_and_unexpected_weights_are_listed_together(official, clip_folder, tmp_path):
    weights = official.weights()
    del weights["model.norm.weight"], weights["model.mm_projector.mlp.2.bias"]
    weights |= {"model.layers.9.mlp.up_proj.weight": torch.zeros(2), "optimizer.step": torch.zeros(1)}
    weights["lm_head.weight"] = torch.zeros(7, 64)
    source = write(tmp_path / "official", official.config, weights, "sharded bin")
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", vision_tower=clip_folder)
    message = str(caught.value)
    assert "missing language_model.model.norm.weight, multi_modal_projector.mlp.2.bias;" in message
    assert "unexpected model.layers.9.mlp.up_proj.weight, optimizer.step;" in message
    assert "lm_head.weight has shape (7, 64), expected (48, 64)" in message
    assert not (tmp_path / "out").exists()


def test_a_long_list_of_missing_weights_is_cut(official, clip_folder, tmp_path):
    weights = {name: tensor for name, tensor in official.weights().items() if ".layers." not in name}
    source = write(tmp_path / "official", official.config, weights, "bin")
    refused(source, tmp_path / "out", CheckpointError, r"and 16 more$", vision_tower=clip_folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, float("nan")], ids=str)
@pytest.mark.parametrize("packing", ["bin", "safetensors"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.mm_projector.mlp.0.weight"])
def test_weights_of_another_kind_are_refused(official, clip_folder, tmp_path, name, packing, kind):
    weights = official.weights()
    weights[name] = weights[name] * kind if isinstance(kind, float) else weights[name].to(kind)
    source = write(tmp_path / "official", official.config, weights, packing)
    refused(source, tmp_path / "out", CheckpointError, re.escape(name), vision_tower=clip_folder)


def test_values_beyond_the_range_of_the_wanted_dtype_are_refused(official, clip_folder, tmp_path):
    weights = official.weights()
    weights["model.norm.weight"][0] = 1e6
    source = write(tmp_path / "official", official.config, weights, "bin")
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    message = r"norm\.weight in .* infinite as float16"
    refused(source, tmp_path / "half", CheckpointError, message, vision_tower=clip_folder, dtype="float16")


def test_a_weight_that_comes_twice_is_refused(official, clip_folder, tmp_path):
    weights = official.weights()
    weights["norm.weight"] = weights["model.norm.weight"].clone()
    source = write(tmp_path / "official", official.config, weights, "bin")
    refused(source, tmp_path / "out", CheckpointError, r"norm\.weight in .* are the same", vision_tower=clip_folder)


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch.save", "pickle", "torn", "noise", "nested", "list"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_file_of_anything_but_tensors_is_refused_unrun(official, clip_folder, tmp_path, form, file):
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    (source / "pytorch_model.bin").unlink()
    path, touched = source / file, tmp_path / "touched"
    content: Any = {"lm_head.weight": torch.zeros(2), "code": Evil(touched)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"code": Evil(touched)}))
    elif form == "noise":
        path.write_bytes(b"\x00\x01weights" * 99)
    elif form == "torn":
        torch.save(official.weights(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        torch.save({"nested": {"state_dict": {}}, "list": [torch.zeros(2)]}.get(form, content), path)
    refused(source, tmp_path / "out", CheckpointError, file, vision_tower=clip_folder)
    assert not touched.exists()


def test_a_torn_safetensors_file_is_refused(official, clip_folder, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(), "safetensors")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(source, tmp_path / "out", CheckpointError, "not a safetensors file", vision_tower=clip_folder)


def test_an_index_that_does_not_fit_is_refused(official, clip_folder, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(), "sharded bin")
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    refused(
        source, tmp_path / "out", CheckpointError, "not there: pytorch_model-00002-of-00003", vision_tower=clip_folder
    )
    (source / "pytorch_model.bin.index.json").write_text("{}")
    refused(source, tmp_path / "out", CheckpointError, "no weight_map", vision_tower=clip_folder)
    (source / "pytorch_model.bin.index.json").write_text("{")
    refused(source, tmp_path / "out", CheckpointError, "not a JSON file", vision_tower=clip_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt'"),
        ({"text_config": {}}, "Hugging Face's layout already"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer -1; only -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'; only 'patch'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True; only False"),
        ({"rms_norm_eps": None, "vocab_size": None}, "lacks vocab_size, rms_norm_eps"),
        ({"scale_factor": None}, r"names no scale_factor; give it: --scale-factor 2 \(144"),
        ({"scale_factor": 3}, "scale_factor=3 doesn't divide the grid of 4 x 4"),
    ],
)
def test_an_unknown_config_is_refused(official, clip_folder, tmp_path, changes, message):
    config = {name: value for name, value in {**official.config, **changes}.items() if value is not None}
    source = write(tmp_path / "official", config, official.weights(), "bin")
    refused(source, tmp_path / "out", ValueError, message, vision_tower=clip_folder)


def test_the_scale_factor_comes_from_the_option_where_the_config_has_none(official, clip_folder, tmp_path):
    config = {name: value for name, value in official.config.items() if name != "scale_factor"}
    source = write(tmp_path / "official", config, official.weights(), "bin")
    convert(source, tmp_path / "out", vision_tower=clip_folder, scale_factor=SCALE)
    check(tmp_path / "out", official)


def test_options_that_contradict_or_mean_nothing_are_refused(source, clip_folder, tmp_path):
    out, options = tmp_path / "out", {"vision_tower": clip_folder}
    refused(source, out, ValueError, "has scale_factor 2, but 4 was given", scale_factor=4, **options)
    refused(source, out, ValueError, "dtype must be one of float32, bfloat16, float16", dtype="int8", **options)
    refused(tmp_path, out, FileNotFoundError, r"no pytorch_model\*\.bin", **options)
    refused(tmp_path / "nowhere", out, FileNotFoundError, "is no folder", **options)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_without_config_or_tokenizer_is_refused(official, clip_folder, tmp_path, name):
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    (source / name).unlink()
    refused(source, tmp_path / "out", FileNotFoundError, f"has no {name.partition('.')[0]}", vision_tower=clip_folder)


def test_an_output_folder_that_is_in_use_is_refused_and_an_empty_one_is_taken(source, clip_folder, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / "mine").write_text("kept")
    refused(source, out, FileExistsError, "there and not empty", vision_tower=clip_folder)
    assert (out / "mine").read_text() == "kept"
    (out / "mine").unlink()
    convert(source, out, vision_tower=clip_folder)
    assert (out / "config.json").is_file()
    assert list(tmp_path.iterdir()) == [out], "nothing but the result stays"


def test_a_failure_while_writing_leaves_nothing(source, clip_folder, tmp_path, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shared, "save_file", full)
    refused(source, tmp_path / "out", OSError, "No space left", vision_tower=clip_folder)
