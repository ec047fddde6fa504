"""The page about serving names the models and selectors that are served, and its commands name what exists."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from vltok.cli import app
from vltok.errors import UnsupportedModelError
from vltok.method import _METHODS, Method
from vltok.serving import vllm_overrides
from vltok.serving.architectures import ARCHITECTURES
from vltok.serving.options import check_servable

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    """What stands between two markers of the page, without the two lines of the head."""
    block = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    return "".join(block.splitlines(keepends=True)[2:])


def models() -> str:
    """The rows of the models' table."""
    lines = []
    for kind, own in ARCHITECTURES.items():
        prunes = "images, videos" if own.videos else "images"
        positions = "keep" if own.has_axes else "keep, reindex, stretch"
        lines.append(f"| `{kind}` | `{own.name}` | {prunes} | {positions} |\n")
    return "".join(lines)


def made(cls: type[Method]) -> Method:
    """A method with its defaults, without what drops tokens inside the decoder."""
    defaults = {field.name: field.default for field in fields(cls)}
    given = {"keep_ratio": 0.5} if "keep_ratio" in defaults else {}
    return cls(**given, **({"relevance": False} if defaults.get("relevance") is True else {}))


def selectors() -> str:
    """The rows of the selectors' table."""
    lines = []
    for name, cls in sorted(_METHODS.items()):
        try:
            selector = check_servable(made(cls))
        except UnsupportedModelError:
            continue
        if not cls.__module__.startswith("vltok."):
            continue  # registered by a test
        looks = ["attention"] if any(selector.attention_request(has_cls) for has_cls in (False, True)) else []
        lines.append(f"| `{name}` | {', '.join([*looks, *sorted(selector.needs)]) or 'embeddings'} |\n")
    return "".join(lines)


@pytest.mark.parametrize("table", [models, selectors], ids=lambda table: table.__name__)
def test_the_tables_are_those_of_the_code(table):
    assert between(table.__name__) == table(), f"write this between the markers:\n{table()}"


def test_every_method_is_served_or_named_among_what_is_not():
    refused = PAGE.split("## What can't be served")[1].split("\n## ")[0]
    named = {*re.findall(r"`(\w+)`", between("selectors") + refused)}
    ours = {name for name, cls in _METHODS.items() if cls.__module__.startswith("vltok.")}
    assert ours <= named


def test_the_command_prints_what_the_page_says():
    from typer.testing import CliRunner

    (command,) = re.findall(r"^python -m vltok (serve .*)", PAGE, re.MULTILINE)
    (printed,) = re.findall(r"^vllm serve .*", PAGE, re.MULTILINE)
    overrides = json.loads(shlex.split(printed)[4])
    assert overrides == vllm_overrides("llava", "divprune,keep_ratio=0.25", max_keep_ratio=0.5)
    done = CliRunner().invoke(app, ["llava" if word == "MODEL" else word for word in shlex.split(command)])
    assert shlex.split(done.output.replace("llava", "MODEL", 1)) == shlex.split(printed)


def test_every_file_and_heading_the_page_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    headings = {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-")
        for line in PAGE.splitlines()
        if line[:3] == "## "
    }
    for link in links:
        file, _, heading = link.partition("#")
        assert (ROOT / "docs" / file).exists() if file else heading in headings, link
