"""A condenser that vltok saved answers as vltok on transformers does, and what can't be served is refused at start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from serving.vllm.serving import ROOT, arguments, check_agrees, engine, generate, golden, request
from vllm.engine.arg_utils import EngineArgs

from vltok.errors import UnsupportedModelError
from vltok.serving import vllm_overrides
from vltok.serving.vllm import register

register()
SAVED = {file.parent.name: json.loads(file.read_text()) for file in sorted(ROOT.glob("*/condensed.json"))}
CASES = [(name, text) for name, rows in SAVED.items() for text in rows]
NAME, TEXT = CASES[0]


def overrides(name: str, text: str) -> dict[str, Any]:
    """What vLLM is started with."""
    return vllm_overrides(ROOT / name, ROOT / name / text)


@pytest.mark.parametrize(("name", "text"), CASES, ids=[f"{name}-{text}" for name, text in CASES])
def test_answers_are_those_of_transformers(name, text):
    found = golden(name)
    asked = [request(name, each) for each in found["requests"]]
    with engine(name, hf_overrides=overrides(name, text)) as llm:
        rows = generate(llm, asked)
    check_agrees(rows, SAVED[name][text], f"{name}, {text}")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in SAVED[name][text]]
    whole = [row["prompt"] for row in found["results"][""]["rows"]]
    assert all(row["prompt"] < own for row, own in zip(rows, whole, strict=True))


def test_requests_have_no_budgets():
    asked = golden(NAME)["requests"][:1]
    with engine(NAME, hf_overrides=overrides(NAME, TEXT)) as llm:
        with pytest.raises(ValueError, match="visual_keep_ratio is for pruning"):
            generate(llm, [request(NAME, asked[0], visual_keep_ratio=0.5)])
        check_agrees(generate(llm, [request(NAME, asked[0])]), SAVED[NAME][TEXT][:1], "after a refusal")


def test_a_server_without_images_has_no_projector():
    text = {"prompt": "w1 w2 w3"}
    with engine(NAME, hf_overrides=overrides(NAME, TEXT), limit_mm_per_prompt={"image": 0}) as llm:
        condensed = generate(llm, [text])
    with engine(NAME) as llm:
        plain = generate(llm, [text])
    check_agrees(condensed, plain, "text alone")


def start(**changes: Any) -> Any:
    """As much of a start as happens before a model is loaded."""
    given = arguments(NAME, hf_overrides={**overrides(NAME, TEXT), **changes})
    return EngineArgs(model=given.pop("model"), **given).create_model_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vltok_pruning": "divprune,keep_ratio=0.25"}, "leave one out"),
        ({"vltok_condenser": None}, "must name a folder"),
        ({"vltok_condenser": str(ROOT)}, r"has no vltok_config\.json"),
        ({"vltok": {"methods": []}}, "serve the model that it was made from"),
        ({"architectures": ["VltokLlavaForConditionalGeneration"]}, "prunes, and knows no vltok_condenser"),
        ({"vision_feature_select_strategy": "full"}, "form no grid"),
        ({"projector_hidden_act": "relu"}, 'use TokenPacker with init="random"'),
    ],
)
def test_what_can_not_be_served_is_refused_with_the_way_out(changes, message):
    start()
    with pytest.raises((ValueError, UnsupportedModelError), match=message):
        start(**changes)


def test_settings_that_do_not_fit_the_model_are_refused_before_it_is_loaded(tmp_path):
    folder = changed(tmp_path, scale_factor=3)
    with pytest.raises(ValueError, match="scale_factor=3 doesn't divide the grid"):
        start(vltok_condenser=str(folder))


def test_weights_that_do_not_fit_the_settings_are_refused(tmp_path):
    shutil.copytree(ROOT / NAME / TEXT, tmp_path / "other")
    other = next(ROOT / NAME / text for text in SAVED[NAME] if text.startswith("tokenpacker"))
    shutil.copy(other / "vltok.safetensors", tmp_path / "other")
    with (
        pytest.raises(ValueError, match=r"vltok\.safetensors doesn't fit"),
        engine(NAME, hf_overrides={**overrides(NAME, TEXT), "vltok_condenser": str(tmp_path / "other")}),
    ):
        pass


def changed(folder: Path, **settings: Any) -> Path:
    """A copy of a saved condenser with other settings."""
    made = Path(shutil.copytree(ROOT / NAME / TEXT, folder / "changed"))
    content = json.loads((made / "vltok_config.json").read_text())
    content["methods"][0].update(settings)
    (made / "vltok_config.json").write_text(json.dumps(content))
    return made
