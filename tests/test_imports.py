"""Who may import whom, read from the source; and what `import vltok` loads, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vltok").rglob("*.py"))

# A part of the package is a file or a folder right under vltok/, or one of a server; these are the parts it may import
# besides itself.
MAY_IMPORT = {
    "__init__": {
        "api",
        "errors",
        "families",
        "handle",
        "method",
        "methods",
        "nn",
        "report",
        "resizing",
        "serialization",
        "version",
        "visual",
    },
    "__main__": {"cli"},
    "cli": {
        "api",
        "convert",
        "drawing",
        "errors",
        "families",
        "files",
        "method",
        "methods",
        "report",
        "serving",
        "train",
    },
    "drawing": {"errors", "tokens"},
    "api": {"calls", "edits", "families", "handle", "method", "run"},
    "handle": {"calls", "edits", "method", "report", "run", "version"},
    "serialization": {"api", "checks", "engine", "errors", "families", "files", "handle", "method"},
    "families": {"checks", "edits", "engine", "errors", "method", "recompute", "run", "tokens", "views", "visual"},
    "engine": {"edits", "errors", "method", "recompute", "report", "run", "tokens", "views", "visual"},
    "methods": {
        "autograd",
        "checks",
        "edits",
        "errors",
        "kernels",
        "method",
        "recompute",
        "report",
        "tokens",
        "views",
        "visual",
    },
    "convert": {"api", "checks", "errors", "files", "methods", "serialization"},
    "train": {"api", "engine", "errors", "files", "method", "processing", "serialization"},
    "integrations": {"api", "engine", "errors", "families", "handle", "method", "report", "serialization"},
    "serving": {"errors", "files", "method", "methods", "serialization", "tokens", "version", "visual"},
    "serving/vllm": {"engine", "errors", "method", "methods", "serving", "tokens", "version", "visual"},
    "processing": {"errors", "files", "methods", "version"},
    "models": {"checks", "errors", "methods", "recompute", "tokens"},
    "nn": {"methods", "tokens"},
    "views": {"edits", "method", "visual"},
    "visual": {"tokens"},
    "method": {"edits", "errors", "run"},
    "run": {"method"},
    "edits": {"errors"},
    "files": {"checks", "errors"},
    "kernels": {"checks", "errors", "tokens"},
    "calls": {"errors"},
    "checks": {"errors"},
    "autograd": set(),
    "errors": set(),
    "recompute": set(),
    "report": {"tokens"},
    "resizing": {"checks", "edits", "errors", "picture_sizes"},
    "picture_sizes": {"errors"},
    "tokens": set(),
    "version": set(),
}
# All else but the standard library that a part may import: all but engine and families is pure tensor code.
LIBRARIES = {
    "__init__": {"lazy_loader"},
    "engine": {"torch", "transformers"},
    "families": {"torch", "transformers", "timm"},
    "cli": {"PIL", "rich", "torch", "transformers", "typer"},
    "drawing": {"torch", "PIL"},
    "files": {"torch", "huggingface_hub", "safetensors"},
    "serialization": {"torch", "safetensors", "transformers"},
    "convert": {"torch", "safetensors", "tqdm", "transformers", "typer"},
    "train": {"torch", "transformers", "PIL", "datasets", "jinja2", "peft", "typer"},
    "processing": {"torch", "transformers"},
    "integrations": {"torch", "transformers", "accelerate", "av", "lmms_eval", "loguru", "numpy", "PIL", "tqdm"},
    "serving": {"torch", "typer"},
    "serving/vllm": {"torch", "transformers", "vllm"},
    "kernels": {"torch", "triton"},
    "methods": {"torch", "einops"},
    "models": {"torch", "timm"},
}


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to."""
    first, *rest = file.relative_to(ROOT / "vltok").parts
    return f"{first}/{rest[0]}" if first == "serving" and len(rest) > 1 else first.removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Every module a source names in an import, at the top or inside a function; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def forbidden(part: str, source: str) -> list[str]:
    """The imports of a source that a file of this part may not have."""
    found = []
    for name in imports(source):
        library, _, rest = name.partition(".")
        if library == "vltok":
            allowed = MAY_IMPORT[part] | {part}
            found += [name] if rest.partition(".")[0] not in allowed and name != "vltok.__version__" else []
        elif library not in LIBRARIES.get(part, {"torch"}) | sys.stdlib_module_names:
            found.append(name)
    return found


def test_the_public_names_follow_the_dependency_direction():
    """Those of the stub, which have to be named relative to the package."""
    source = (ROOT / "vltok" / "__init__.pyi").read_text(encoding="utf-8")
    source = re.sub(r"from \.(\w)", r"from vltok.\1", source).replace("from . import", "from vltok import")
    assert len(list(imports(source))) > 50
    assert forbidden("__init__", source) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_dependency_direction(file):
    part = part_of(file)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    assert forbidden(part, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("methods", "from vltok.families import view"),
        ("methods", "from vltok import families"),
        ("methods", "from vltok.engine.layout import Layout"),
        ("engine", "from vltok.families.vlm.base import VlmFamily"),
        ("engine", "from vltok.methods.pruning.todre import ToDRE"),
        ("families", "def f():\n    import vltok.methods.pruning.todre"),
        ("methods", "import transformers"),
        ("kernels", "from timm.layers import Mlp"),
        ("views", "import transformers.masking_utils as m"),
        ("tokens", "from vltok.method import Run"),
        ("nn", "from transformers import AutoModel"),
        ("checks", "import vltok"),
        ("edits", "from vltok.api import apply"),
        ("api", "from eval.canvas import data"),
        ("families", "import tests.tiny"),
        ("api", "import examples.prune_llava"),
        ("methods", "from . import selector"),
        ("api", "import PIL.Image"),
        ("models", "from vltok.families import FAMILIES"),
        ("models", "import transformers"),
        ("__init__", "from vltok import models"),
        ("serving", "import vllm"),
        ("serving", "from transformers import AutoConfig"),
        ("serving", "from vltok.engine.features import pixel_keys"),
        ("serving/vllm", "from vltok.families.vlm.base import VlmFamily"),
        ("engine", "import vllm.config"),
        ("api", "from vltok.serving.options import Pruning"),
        ("api", "import lmms_eval"),
        ("serialization", "from vltok.integrations.lmms_eval.usage import Usage"),
    ],
)
def test_a_forbidden_import_is_seen(part, source):
    assert len(forbidden(part, source)) == 1


def loaded_after(statement: str) -> set[str]:
    """Names of the modules a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_vltok_loads_nothing_and_its_names_torch_alone():
    assert not {"torch", "transformers", "numpy"} & loaded_after("import vltok")
    loaded = loaded_after("import vltok\nfor name in vltok.__all__:\n    getattr(vltok, name)")
    libraries = {name.partition(".")[0] for name in loaded - loaded_after("import torch, lazy_loader")}
    assert "torch" in loaded
    assert libraries - sys.stdlib_module_names == {"vltok"}
    assert not {"transformers", "timm", "PIL", "safetensors", "triton", "matplotlib"} & loaded
    lazy = ("vltok.families.vlm.", "vltok.families.towers.", "vltok.engine.attention", "vltok.engine.pruning")
    assert not any(name.startswith(lazy) for name in loaded)


def test_what_is_said_of_serving_loads_no_server():
    loaded = loaded_after("import vltok.serving.architectures, vltok.serving.options, vltok.serving.positions")
    assert not any(name.startswith(("vllm", "transformers", "vltok.serving.vllm")) for name in loaded)
