"""The README's Python runs, on a tiny model in the place of the large one; its commands name what exists."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from remote import modeling_remote
from tiny import LLAVA, picture
from zoo.qwen import QWEN3_VL

import vltok
from vltok.families.vlm import VLMS
from vltok.serving.options import FIELD, Pruning
from vltok.tokens import keep_count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


STANDS_FOR = {"llava-hf/llava-1.5-7b-hf": LLAVA, "Qwen/Qwen3-VL-8B-Instruct": QWEN3_VL}
WORDS = "{% for part in messages[0].content %}{{ part.text or marks[part.type] }} {% endfor %}"


def processor_of(name: str | Path) -> Any:
    """The small processor that stands for a large one, with a template that writes every part of a turn."""
    family = STANDS_FOR.get(name, LLAVA)  # or it is a folder that the README wrote
    processor = family.processor()
    processor.chat_template = f"{{% set marks = {{'image': {family.image!r}, 'video': {family.video!r}}} %}}{WORDS}"
    return processor


class Engine:
    """Stands for vLLM's engine: reads its settings as a server does, and answers with the share that is kept."""

    def __init__(self, model: str, hf_overrides: dict[str, Any]) -> None:
        self.pruning = Pruning.of_field(hf_overrides[FIELD])

    def generate(self, requests: list[dict[str, Any]]) -> list[float]:
        return [self.pruning.of_request(request.get("mm_processor_kwargs", {})).keep_ratio for request in requests]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs_from_top_to_bottom(monkeypatch, tmp_path, capsys):
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
    scope: dict[str, object] = {"__name__": "readme"}
    assert len(blocks("python")) >= 4
    try:
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), scope)
    finally:
        registered = VLMS.pop("mine", None)
    printed = capsys.readouterr().out
    assert "visual tokens 16 -> 2" in printed
    assert f"visual tokens 60 -> {keep_count(60, 0.2, None)}" in printed
    assert "visual tokens 24 -> 12" in printed, "EVS keeps the first of two frames whole"
    assert scope["llm"].pruning.selector == vltok.DivPrune(keep_ratio=0.25)
    assert scope["answers"] == [0.25, 0.1]
    assert registered.facts["marks"] == {"image": 32000} and registered.facts["gap"] == 1
    assert scope["kept"].shape == (2, 58, 1024)
    assert torch.equal(scope["indices"].sort(dim=1).values, scope["indices"])
    vltok.apply(scope["model"], vltok.StrideTokens(num_keep=1)).remove()  # refused if a snippet left its handle on


def test_every_module_the_readme_runs_exists():
    modules = set(re.findall(r"python -m ((?:eval|vltok)[\w.]*)", README))
    assert {"eval.canvas", "eval.cost", "eval.selection"} <= modules
    assert [name for name in modules if find_spec(name) is None] == []


def test_every_file_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_both_commands_are_single_lines_and_the_second_is_what_ci_runs():
    setups = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python3 -m venv ")]
    canvas, tests = (line.split(" && ")[-1] for line in setups)
    assert canvas == ".venv/bin/python -m eval.canvas"
    assert tests.removesuffix(' -n auto --dist loadfile -m "quick or not zoo"') == ".venv/bin/python -m pytest"
    pattern = re.search(r"grep -m 1 '([^']+)' README\.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert [line for line in README.splitlines() if re.search(pattern, line)] == setups[1:]


def test_ci_pins_the_lower_bounds_for_its_oldest_leg():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    lines = (ROOT / ".ci" / "floor.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(re.match(r"([\w-]+)===?(.+)", line).groups() for line in lines if not line.startswith("#"))
    for bound in bounds:
        name, lowest = bound.split(">=")
        assert f"{pins[name]}.".startswith(f"{lowest}."), f"{bound}, but CI's oldest leg runs {pins[name]}"
