"""The wheel holds the package, all of it and nothing else, and tells other programs where it is."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]
# Who looks for what, and which of these programs must be installed to load it.
ENTRY_POINTS = {
    "console_scripts": {"vltok": "vltok.__main__:main"},
    "lmms_eval.models": {"vltok": "vltok.integrations.lmms_eval:manifests"},
    "vllm.general_plugins": {"vltok": "vltok.serving.vllm:register"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, as building writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in ("vltok", "tests", "eval", "examples"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__", "*.safetensors", "*.npz"))
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (folder / "dist").mkdir()
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(folder / "dist" / run.stdout.splitlines()[-1])


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "vltok").rglob("*.py")}
    assert names == {*expected, "vltok/__init__.pyi", "vltok/py.typed"}


def test_the_wheel_tells_other_programs_where_vltok_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    told = configparser.ConfigParser()
    told.read_string(wheel.read(name).decode())
    assert {group: dict(told[group]) for group in told.sections()} == ENTRY_POINTS


@pytest.mark.parametrize("target", [target for group in ENTRY_POINTS.values() for target in group.values()])
def test_what_an_entry_point_names_is_there(target):
    module, _, function = target.partition(":")
    assert callable(getattr(import_module(module), function))
