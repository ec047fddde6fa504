"""The table of supported models says what tiny models of every family show, and is told in the README as it is."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
import zoo
from tap_backbones import FAN, make
from tiny import TEXT, TOWER, TinyFamily
from torch import nn
from towers import TOWERS, Tower, shared_tower
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from typer.testing import CliRunner
from unchanged import unchanged

import vltok
from vltok.cli import app
from vltok.cli.families import BEGIN, END, markdown
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.generic import Generic

ROOT = Path(__file__).parents[1]
MODELS = vltok.supported_models()
_ZOO = [import_module(f"zoo.{module.name}") for module in pkgutil.iter_modules(zoo.__path__)]
_ALL = [*tiny.ALL, *tiny.WINDOWED, *(row for file in _ZOO for row in getattr(file, "ROWS", ()))]
ROWS = {row.key: row for row in _ALL if row.name in MODELS["vlm"]}
METHODS = {"SOFT": vltok.SOFT(ratio=2), "TAP": vltok.TAP(num_scales=2), "ADL": vltok.ADL()}


def takes(model: nn.Module, method: vltok.Method, processor: Any = None) -> bool:
    """Whether a method can be put on a model."""
    try:
        vltok.apply(model, method, processor=processor).remove()
    except (UnsupportedModelError, ValueError):
        return False
    return True


# Vision-language models


@pytest.mark.parametrize("family", ROWS.values(), ids=ROWS)
def test_a_model_shows_what_the_table_says(family: TinyFamily):
    model, support = family.model(), MODELS["vlm"][family.name]
    assert model.config.model_type in support.model_types
    assert type(model.model).__name__ in support.model_classes
    assert ("video" in tiny.marks(model)) >= (support.videos == "yes")
    assert takes(model, vltok.StrideTokens(num_keep=2))
    for positions in ("keep", "reindex", "stretch"):
        assert takes(model, vltok.StrideTokens(num_keep=2, positions=positions)) == (positions in support.positions)
    assert takes(model, vltok.FasterVLM(num_keep=2)) == support.attention
    assert takes(model, vltok.FasterVLM(num_keep=2, score="cls")) == family.has_cls
    for condenser in (vltok.AveragePool, vltok.PixelShuffle, vltok.TokenPacker):
        method = condenser(scale_factor=family.packer_scale)
        assert takes(model, method, family.processor()) == (condenser.__name__ in support.condensers)


@pytest.mark.parametrize("name", MODELS["vlm"])
def test_the_table_says_what_the_rows_of_the_tests_are(name):
    rows = [row for row in ROWS.values() if row.name == name]
    support = MODELS["vlm"][name]
    assert rows, "a family that the tests build no model of"
    assert (support.videos != "no") == any(row.video for row in rows)
    assert (support.videos == "frames") == any(row.video and "video" not in tiny.marks(row.model()) for row in rows)
    assert support.windows == any(row.windowed for row in rows)
    assert support.real_processor == all(row.real for row in rows)
    assert (support.cls != "no") == any(row.has_cls for row in rows)
    assert (support.cls == "yes") <= all(row.has_cls for row in rows)


def test_model_types_are_those_that_transformers_has_for_the_classes():
    types: dict[str, set[str]] = {}
    for model_type, head in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        types.setdefault(head, set()).add(model_type)
    found = {name: types.get(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name)) for name in MODELS["vlm"]}
    assert {name: set(MODELS["vlm"][name].model_types) for name, known in found.items() if known} == {
        name: known for name, known in found.items() if known
    }
    assert sum(map(bool, found.values())) > 30


def test_a_llava_with_another_tower_is_refused_as_the_table_says():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "pixtral", **TOWER, "head_dim": 16, "image_size": 56, "patch_size": 14}
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config={**TEXT, "model_type": "llama"})
    )
    assert MODELS["vlm"]["llava"].refuses == "vision towers other than CLIP and SigLIP"
    with unchanged(model), pytest.raises(UnsupportedModelError, match="'pixtral' vision tower is not supported"):
        vltok.apply(model, vltok.StrideTokens(num_keep=2))


# Vision towers


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_a_tower_takes_the_methods_that_the_table_says(tower: Tower):
    model = shared_tower(tower)
    found = tuple(name for name, method in METHODS.items() if takes(model, method))
    told = MODELS["tower"][tower.family].methods
    assert found == tuple(name for name in told if tower.replaceable or name != "SOFT")


def test_towers_with_less_are_told():
    backbone, rotary = make(FAN), timm.create_model("eva02_tiny_patch14_224", depth=2)
    assert rotary.rope is not None
    assert MODELS["tower"]["tap_backbone"].methods == ("ADL",)
    assert [name for name, method in METHODS.items() if takes(backbone, method)] == ["ADL"]
    assert MODELS["tower"]["timm_eva"].refuses == "SOFT and ADL where positions are rotary"
    assert [name for name, method in METHODS.items() if takes(rotary, method)] == ["TAP"]


def test_every_tower_of_the_table_is_built_in_the_tests():
    assert {tower.family for tower in TOWERS.values()} | {"tap_backbone"} == set(MODELS["tower"])


# What is refused


def _mllama() -> nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1]}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


def _florence2() -> nn.Module:
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    sizes = {"embed_dim": [8, 8, 8, 8], "num_heads": [1] * 4, "num_groups": [1] * 4, "depths": [1] * 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    text = {
        "model_type": "bart",
        "vocab_size": 64,
        "d_model": 32,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        **layers,
    }
    vision = {**sizes, "projection_dim": 32}
    return Florence2ForConditionalGeneration(Florence2Config(vision_config=vision, text_config=text))


class Around(nn.Module):
    """A wrapper that knows nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("family", [None, "generic"])
@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: model.model, Around], ids=["head", "bare", "inside"]
)
@pytest.mark.parametrize(("make", "reason"), [(_mllama, "by cross-attention"), (_florence2, "encoder-decoder")])
def test_models_of_another_design_are_refused_with_the_reason(make, reason, wrap, family):
    model = wrap(make())
    with (
        unchanged(model),
        pytest.raises(UnsupportedModelError, match=f"can't be pruned, as no .* can: .*{reason}") as told,
    ):
        vltok.apply(model, vltok.StrideTokens(num_keep=2), family=family)
    assert "\n" not in str(told.value) and str(told.value).count(". ") == 0


# The table for people


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    told = page.partition(f"{BEGIN}\n")[2].partition(END)[0]
    assert told == markdown(), "run: python -m vltok families --into docs/families.md"


def test_the_command_writes_the_table_between_the_markers_and_nothing_else(tmp_path):
    file = tmp_path / "read.md"
    file.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["families", "--into", str(file)])
    assert result.exit_code == 0, result.output
    assert file.read_text(encoding="utf-8") == f"above\n{BEGIN}\n{markdown()}{END}\nbelow\n"


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_file_without_markers_stays_as_it_is(tmp_path, text):
    file = tmp_path / "read.md"
    file.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["families", "--into", str(file)])
    assert (result.exit_code, "must have" in result.output) == (1, True)
    assert file.read_text(encoding="utf-8") == text


def test_the_command_prints_every_cell_and_every_refusal():
    result = CliRunner().invoke(app, ["families"])
    assert result.exit_code == 0, result.output
    lines, words = result.output.splitlines(), " ".join(result.output.split())
    for supports in MODELS.values():
        for support in supports.values():
            cells = list(support.cells().values())
            assert [line for line in lines if re.split(r" {2,}", line.strip()) == cells], cells
            assert support.refuses in words
    assert "Mllama (Llama 3.2 Vision): refused" in words and "Florence-2: refused" in words


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_of_the_command_line_is_named(missing):
    code = f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_module('vltok', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"vltok's command line needs {missing}: python -m pip install 'vltok[cli]'\n"


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert re.search(r"families +Print which models vltok knows, and what it does on them\.", result.output)


def test_supported_models_is_a_copy_of_what_is_known():
    vltok.supported_models()["vlm"].clear()
    assert list(vltok.supported_models()["vlm"]) == list(MODELS["vlm"])
    with torch.no_grad(), pytest.raises(AttributeError):
        MODELS["vlm"]["llava"].title = "mine"


def test_a_fact_that_no_family_has_is_refused():
    with pytest.raises(TypeError, match="VlmFamily has no window, which Mine is described by"):
        Generic("mine", "Mine", ("MineModel",), window=True)
