"""save() and load(): what is written, what comes back, and every way a folder can be wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAVA, picture
from torch import nn
from unchanged import unchanged

import vltok
from vltok.edits import Edits
from vltok.errors import CheckpointError
from vltok.method import Method, Run, register

TODRE = vltok.ToDRE(keep_ratio=0.25, depth=(0.5, 0.75), tau=0.9, strategy="k_center")


@register("test-gain")
@dataclass(frozen=True)
class Gain(Method):
    """A method with weights: a linear layer on top of the projector."""

    width: int = 64

    def attach(self, view: Any, edits: Edits, run: Run) -> None:
        projector = view.host.multi_modal_projector
        edits.add_child(projector, "gain", nn.Linear(self.width, self.width))
        edits.after(projector, lambda module, args, kwargs, output: output + module.gain(output))


@pytest.fixture(scope="module")
def inputs() -> Any:
    return LLAVA.inputs(["w1 <image> w2 w3", "w4"], [picture(0)])


@pytest.fixture(scope="module")
def model(inputs) -> nn.Module:
    model = LLAVA.model()
    model(**inputs)  # transformers hooks itself in at the first call
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """Where ToDRE was saved."""
    with vltok.apply(model, TODRE) as handle:
        vltok.save(handle, tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def rewrite(folder: Path, **changes: Any) -> None:
    """Change top-level fields of the settings file; None takes one out."""
    path = folder / "vltok_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite_method(folder: Path, **changes: Any) -> None:
    """Change fields of the saved method, as a vltok 7.0 might have written them."""
    config = json.loads((folder / "vltok_config.json").read_text())
    rewrite(folder, vltok_version="7.0", methods=[config["methods"][0] | changes])


def test_the_settings_file_says_what_wrote_it_and_every_knob(folder):
    assert [path.name for path in folder.iterdir()] == ["vltok_config.json"], "a training-free method has no weights"
    assert json.loads((folder / "vltok_config.json").read_text()) == {
        "vltok_version": vltok.__version__,
        "family": "llava",
        "methods": [
            {
                "method": "todre",
                "version": 1,
                "keep_ratio": 0.25,
                "num_keep": None,
                "positions": "keep",
                "per": "image",
                "merge": None,
                "regions": None,
                "strategy": "k_center",
                "pivot": "auto",
                "relevance": True,
                "depth": [0.5, 0.75],
                "tau": 0.9,
                "stages": [1, 2],
                "seed": 0,
                "correction": None,
            }
        ],
    }


def test_a_loaded_method_does_what_the_saved_one_did(model, inputs, folder):
    with vltok.apply(model, TODRE):
        expected = logits(model, inputs)
    with unchanged(model), vltok.load(model, str(folder)) as handle:
        assert handle.methods == (TODRE,)
        assert handle.family == "llava"
        assert torch.equal(logits(model, inputs), expected)


def test_several_methods_keep_their_order(model, tmp_path):
    methods = (Gain(), vltok.StrideTokens(num_keep=3))
    with vltok.apply(model, methods) as handle:
        vltok.save(handle, tmp_path)
    with vltok.load(model, tmp_path) as handle:
        assert handle.methods == methods


def test_a_removed_handle_has_nothing_to_save(model, tmp_path):
    handle = vltok.apply(model, TODRE)
    handle.remove()
    with pytest.raises(ValueError, match="save before remove"):
        vltok.save(handle, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dropout"}, r"unknown method 'dropout' \(written by vltok 7\.0\); this vltok knows adl, "),
        ({"method": "os.system"}, r"unknown method 'os\.system'"),
        (
            {"sharpness": 3},
            r"unknown field 'sharpness' of todre \(written by vltok 7\.0\); this vltok knows correction, ",
        ),
        ({"version": 2}, r"todre was written in format 2 by vltok 7\.0; this vltok reads format 1"),
        ({"version": None}, r"written in format None by vltok 7\.0"),
    ],
)
def test_a_method_this_version_does_not_know_names_the_version_that_wrote_it(model, folder, changes, message):
    rewrite_method(folder, **changes)
    with unchanged(model), pytest.raises(CheckpointError, match=message):
        vltok.load(model, folder)


def test_a_knob_out_of_range_is_refused_as_in_code(model, folder):
    rewrite_method(folder, keep_ratio=7)
    with unchanged(model), pytest.raises(ValueError, match=r"keep_ratio .* in \(0, 1\], got 7"):
        vltok.load(model, folder)


def test_another_family_is_refused(model, folder):
    rewrite(folder, family="qwen2_5_vl")
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match="saved from a 'qwen2_5_vl' model, this is a 'llava' model"),
    ):
        vltok.load(model, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": None}, "lacks family"),
        ({"methods": None, "vltok_version": None}, "lacks methods, vltok_version"),
        ({"notes": "mine", "vltok_version": "7.0"}, r"unknown fields notes \(written by vltok 7\.0\)"),
    ],
)
def test_a_settings_file_with_other_fields_is_refused(model, folder, changes, message):
    rewrite(folder, **changes)
    with unchanged(model), pytest.raises(CheckpointError, match=message):
        vltok.load(model, folder)


@pytest.mark.parametrize("methods", ["todre", {"method": "todre"}, [7], [], [None]], ids=repr)
def test_methods_that_are_no_list_of_settings_are_refused(model, folder, methods):
    rewrite(folder, methods=methods)
    with unchanged(model), pytest.raises(ValueError, match="method"):
        vltok.load(model, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3"], ids=repr)
def test_a_file_that_is_no_settings_file_is_refused_by_name(model, folder, content):
    (folder / "vltok_config.json").write_bytes(content)
    with unchanged(model), pytest.raises(CheckpointError, match=r"vltok_config\.json"):
        vltok.load(model, folder)


def test_a_folder_without_a_settings_file_is_named(model, tmp_path):
    with unchanged(model), pytest.raises(FileNotFoundError, match=str(tmp_path)):
        vltok.load(model, tmp_path / "nowhere")


# A method with weights


@pytest.fixture
def weighted(model, tmp_path) -> Path:
    """Where a Gain was saved whose weights are all 0.5."""
    with vltok.apply(model, Gain()) as handle:
        with torch.no_grad():
            for parameter in handle.added_modules[0].parameters():
                parameter.fill_(0.5)
        vltok.save(handle, tmp_path)
    return tmp_path


NAMES = ["multi_modal_projector.gain.bias", "multi_modal_projector.gain.weight"]


def test_only_weights_the_method_added_are_written_whatever_the_model_is_wrapped_in(model, weighted, tmp_path):
    saved = load_file(weighted / "vltok.safetensors")
    assert sorted(saved) == NAMES
    with vltok.apply(nn.ModuleDict({"wrapped": model}), Gain()) as handle:
        vltok.save(handle, tmp_path / "wrapped")
    assert sorted(load_file(tmp_path / "wrapped" / "vltok.safetensors")) == NAMES
    assert all((tensor == 0.5).all() for tensor in saved.values())


def test_weights_come_back(model, inputs, weighted):
    plain = logits(model, inputs)
    with unchanged(model):
        with vltok.load(model, weighted) as handle:
            assert all((parameter == 0.5).all() for parameter in handle.added_modules[0].parameters())
            loaded = logits(model, inputs)
        with vltok.load(model, weighted):
            assert torch.equal(logits(model, inputs), loaded)
    assert not torch.allclose(loaded[0], plain[0], atol=1e-3)


def test_weights_take_the_dtype_of_the_model(model, weighted):
    twin = LLAVA.model(dtype=torch.bfloat16)
    with vltok.apply(twin, Gain()) as handle:
        handle.added_modules[0].to(torch.bfloat16)
        vltok.save(handle, weighted)
    with vltok.load(model, weighted) as handle:
        assert handle.added_modules[0].weight.dtype == torch.float32


@pytest.mark.parametrize("damage", ["missing file", "missing tensor", "extra tensor", "shape", "not safetensors"])
def test_weights_that_do_not_fit_are_refused(model, weighted, damage):
    path = weighted / "vltok.safetensors"
    saved, (bias, _) = load_file(path), NAMES
    if damage == "missing file":
        path.unlink()
    elif damage == "not safetensors":
        path.write_bytes(b"\x80\x04}.")
    else:
        changed = {
            "missing tensor": {key: value for key, value in saved.items() if key != bias},
            "extra tensor": saved | {"lm_head.weight": torch.zeros(1)},
            "shape": saved | {bias: torch.zeros(3)},
        }
        save_file(changed[damage], path)
    with unchanged(model), pytest.raises(CheckpointError):
        vltok.load(model, weighted)


def test_saving_over_an_older_folder_leaves_none_of_its_weights(model, weighted):
    with vltok.apply(model, TODRE) as handle:
        vltok.save(handle, weighted)
    with vltok.load(model, weighted) as handle:
        assert handle.methods == (TODRE,)
