"""Whoever has vltok installed and asks for nothing has vLLM as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

from serving.vllm.serving import BOTH, ROOT, check_agrees, engine, generate, golden, request

LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"
# Everything of vLLM that the plugin may use is loaded before it runs.
VLLM = "import vllm, vllm.config.model, vllm.model_executor.models.config; from vllm import ModelRegistry"
PLUGIN = "from vllm.plugins import load_general_plugins; load_general_plugins()"
NAMES = "from vltok.serving.architectures import BY_NAME"
ARE_KNOWN = "assert {*BY_NAME} <= {*ModelRegistry.get_supported_archs()}"


def loaded_after(*statements: str) -> set[str]:
    """Names of the modules a fresh interpreter has loaded after these statements."""
    code, env = "\n".join([*statements, LOADED]), {**os.environ, "VLLM_PLUGINS": "vltok"}  # vLLM has some of its own
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_vllm_finds_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="vltok")
    assert found.value == "vltok.serving.vllm:register"


def test_the_plugin_loads_nothing_but_what_vllm_and_vltok_load_anyway():
    names = "import vltok\nfor name in vltok.__all__:\n    getattr(vltok, name)"
    vllm, vltok = loaded_after(VLLM), loaded_after(names)
    more = loaded_after(VLLM, PLUGIN, NAMES, ARE_KNOWN) - vllm - vltok - {"vllm.plugins"}
    assert {name for name in more if not name.startswith("vltok.serving")} == set()
    assert not any(name.startswith("vltok.serving.vllm.") and name != "vltok.serving.vllm.config" for name in more)
    assert more  # it did run


def test_the_original_architecture_answers_as_ever():
    name = BOTH[1]  # vLLM doesn't know how transformers saves the tower of the other one
    found = golden(name)
    folder = json.loads((ROOT / name / "config.json").read_text())
    plain = {"hf_overrides": {"architectures": folder["architectures"]}}
    with engine(name, None, **plain) as llm:
        rows = generate(llm, [request(name, each) for each in found["requests"]])
        kinds = llm.llm.apply_model(lambda model: type(model).__name__)
    assert kinds == folder["architectures"]
    check_agrees(rows, found["results"][""]["rows"], name)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in found["results"][""]["rows"]]
