"""Run transformers' own common model tests on pruned models, by hand:

    python tests/upstream/run.py [--family llava] [--method stride,keep_ratio=1.0] [--source FOLDER]

The tests are those of the installed transformers, from its source distribution, which pip fetches once (or from the
`tests` folder in --source). Each runs twice: on the models as they are, and with the method on every model that is
built. Prints the tests that pass without the method and fail with it, and exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]
# The source distribution leaves these out; the mixin only inherits from them.
LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def fetch(folder: Path) -> Path:
    """The `tests` package of the installed transformers, with empty classes for what its distribution leaves out."""
    version = transformers.__version__
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--quiet"]
        pip = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}", "-d", str(folder)]
        subprocess.run(pip, check=True)
    source = folder / f"transformers-{version}"
    if not source.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    for path, name in LEFT_OUT.items():
        file = source / "tests" / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {name}:\n    pass\n")
    (source / "tests" / "__init__.py").touch()
    return source


def outcomes(source: Path, method: str, pattern: str) -> dict[str, tuple[str, str]]:
    """Outcome and first error line of every test, with `method` on all models, or without one if it is empty."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (source, ROOT, ROOT / "tests", ROOT / "tests" / "upstream"))),
            "HF_HUB_OFFLINE": "1",
            "VLTOK_UPSTREAM_METHOD": method,
            "VLTOK_UPSTREAM_OUTCOMES": str(file),
        }
        own = ["-p", "plugin", "-p", "no:randomly", "-o", "addopts=", "-o", "pythonpath=", "--rootdir", str(source)]
        cases = str(ROOT / "tests" / "upstream" / "cases.py")
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", *own, "-k", pattern, cases]
        subprocess.run(pytest, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="", help="only families with this in their name")
    parser.add_argument("--method", default="stride,keep_ratio=1.0", help="as Method.from_text reads it")
    parser.add_argument("--source", type=Path, help="folder that holds transformers' tests folder")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "vltok-upstream")
    options = parser.parse_args()
    source = options.source or fetch(options.cache)
    plain = outcomes(source, "", options.family)
    pruned = outcomes(source, options.method, options.family)
    passed = [name for name, (outcome, _) in plain.items() if outcome == "passed"]
    broken = [name for name in passed if pruned.get(name, ("missing", ""))[0] != "passed"]
    for name, (outcome, why) in pruned.items():
        if outcome == "refused":
            print(f"{outcome:8} {name}: {why[:200]}")
    for name in broken:
        outcome, why = pruned.get(name, ("missing", ""))
        print(f"{outcome:8} {name.split('::', 1)[-1]}: {why[:200]}")
    print(f"{len(plain)} tests, {len(passed)} pass without {options.method}, {len(broken)} of them fail with it")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
