"""The Python of README and docs runs, on tiny models in place of large ones; commands and links lead somewhere."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from remote import modeling_remote
from tiny import LLAVA, picture
from zoo.qwen import QWEN3_VL

import vltok
from vltok.families.vlm import VLMS
from vltok.method import _METHODS
from vltok.serving.options import FIELD, Pruning
from vltok.tokens import keep_count
from vltok.train import Recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path for path in (README, *sorted((ROOT / "docs").rglob("*.md")))}
STANDS_FOR = {"llava-hf/llava-1.5-7b-hf": LLAVA, "Qwen/Qwen3-VL-8B-Instruct": QWEN3_VL}
WORDS = "{% for part in messages[0].content %}{{ part.text or marks[part.type] }} {% endfor %}"


def processor_of(name: str | Path) -> Any:
    """The small processor that stands for a large one, with a template that writes every part of a turn."""
    family = STANDS_FOR.get(name, LLAVA)  # or it is a folder that a page wrote
    processor = family.processor()
    processor.chat_template = f"{{% set marks = {{'image': {family.image!r}, 'video': {family.video!r}}} %}}{WORDS}"
    return processor


class Engine:
    """Stands for vLLM's engine: reads its settings as a server does, and answers with the share that is kept."""

    def __init__(self, model: str, hf_overrides: dict[str, Any]) -> None:
        self.pruning = Pruning.of_field(hf_overrides[FIELD]) if FIELD in hf_overrides else None

    def generate(self, requests: list[dict[str, Any]]) -> list[float]:
        return [self.pruning.of_request(request.get("mm_processor_kwargs", {})).keep_ratio for request in requests]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page: str, scope: dict[str, Any]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)


@pytest.fixture
def scope(monkeypatch, tmp_path) -> dict[str, Any]:
    """Names that a page may use: what the README's first lines made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", lambda name, dtype: STANDS_FOR[name].model()
    )
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: processor_of(name))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine))
    monkeypatch.setitem(sys.modules, "modeling_mine", types.SimpleNamespace(MyModel=modeling_remote.RemoteModel))
    picture(0, (80, 50)).save("kitchen.jpg")
    Path("frames").mkdir()
    for number in range(4):
        picture(number, QWEN3_VL.size).save(f"frames/{number}.jpg")
    names: dict[str, Any] = {"__name__": "docs"}
    run("README.md", names)
    with vltok.apply(names["model"], vltok.TokenPacker(scale_factor=2), processor=names["processor"]) as handle:
        vltok.save(handle, "condensed")
    names["model"].config.save_pretrained("MODEL")
    return names | {"image": picture(0, (80, 50))}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, scope, capsys):
    families, methods = dict(VLMS), dict(_METHODS)
    capsys.readouterr()
    try:
        run(page, scope)
        made = {name: family for name, family in VLMS.items() if name not in families}
    finally:
        for table, before in ((VLMS, families), (_METHODS, methods)):
            for name in table.keys() - before.keys():
                del table[name]
    vltok.apply(scope["model"], vltok.StrideTokens(num_keep=1)).remove()  # refused if a block left its handle on
    if page in EXPECTED:
        EXPECTED[page](scope, capsys.readouterr().out, made)


def first_answer(scope, printed, made):
    assert "visual tokens 16 -> 2" in printed


def videos(scope, printed, made):
    assert f"visual tokens 60 -> {keep_count(60, 0.2, None)}" in printed
    assert "visual tokens 24 -> 12" in printed, "EVS keeps the first of two frames whole"


def own_family(scope, printed, made):
    assert made["mine"].facts["marks"] == {"image": 32000} and made["mine"].facts["gap"] == 1


def module(scope, printed, made):
    assert scope["kept"].shape == (2, 58, 1024)
    assert torch.equal(scope["indices"].sort(dim=1).values, scope["indices"])


def served(scope, printed, made):
    assert scope["llm"].pruning.selector == vltok.DivPrune(keep_ratio=0.25)
    assert scope["answers"] == [0.1]


# What came out of a page's blocks, beyond that they ran.
EXPECTED = {
    "README.md": first_answer,
    "docs/quickstart.md": first_answer,
    "docs/pruning.md": videos,
    "docs/own-family.md": own_family,
    "docs/methods.md": module,
    "docs/serving.md": served,
}


def test_every_module_the_pages_run_exists():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    modules = set(re.findall(r"python -m ((?:eval|vltok)[\w.]*)", text))
    assert {"eval.canvas", "eval.cost", "eval.selection", "vltok.train"} <= modules
    assert [name for name in modules if find_spec(name) is None] == []


def anchors(path: Path) -> set[str]:
    """The headings of a page as links name them."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "eval/README.md"])
def test_every_file_and_heading_a_page_links_to_exists(page):
    path = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in PAGES.values() if path != README}


PUBLIC = ("vltok", "vltok.nn", "vltok.models", "vltok.train", "vltok.serving")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    told = {name for path in PAGES.values() for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)}
    exports = import_module(module)
    names = {name for name in exports.__all__ if not isinstance(getattr(exports, name), (types.ModuleType, str))}
    assert {f"{module}.{name}" for name in names} <= told


def test_every_name_of_the_reference_has_a_docstring():
    told = [name for path in PAGES.values() for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)]
    assert len(told) == len(set(told)) > 60
    for name in told:
        module, _, own = name.rpartition(".")
        thing = getattr(import_module(module), own)
        assert isinstance(thing, dict | Recipe) or thing.__doc__, name


def test_both_commands_are_single_lines_and_the_second_is_what_ci_runs():
    setups = [
        line
        for block in blocks("README.md", "bash")
        for line in block.splitlines()
        if line.startswith("python3 -m venv ")
    ]
    canvas, tests = (line.split(" && ")[-1] for line in setups)
    assert canvas == ".venv/bin/python -m eval.canvas"
    assert tests.removesuffix(' -n auto --dist loadfile -m "quick or not zoo"') == ".venv/bin/python -m pytest"
    pattern = re.search(r"grep -m 1 '([^']+)' README\.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert [line for line in README.read_text(encoding="utf-8").splitlines() if re.search(pattern, line)] == setups[1:]


def test_ci_pins_the_lower_bounds_for_its_oldest_leg():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    lines = (ROOT / ".ci" / "floor.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(re.match(r"([\w-]+)===?(.+)", line).groups() for line in lines if not line.startswith("#"))
    for bound in bounds:
        name, lowest = bound.split(">=")
        assert f"{pins[name]}.".startswith(f"{lowest}."), f"{bound}, but CI's oldest leg runs {pins[name]}"
