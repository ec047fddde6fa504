"""The page about benchmarks names the models that lmms-eval finds, and arguments that they take."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

from vltok.integrations.lmms_eval import MODELS
from vltok.integrations.lmms_eval.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
KNOWN = {field.name for field in fields(Settings)}


def test_the_table_names_every_model():
    assert sorted(re.findall(r"^\| `(vltok\w*)`", PAGE, re.MULTILINE)) == sorted(MODELS)


def test_the_commands_are_understood():
    commands = re.findall(r"^lmms-eval (.*?[^\\])\n", PAGE, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        options = dict(zip(words[::2], words[1::2], strict=True))
        given = dict(each.split("=", 1) for each in options["--model_args"].split(","))
        assert options["--model"] in MODELS
        assert Settings.read(options["--model"], {}, given).method.keep_ratio == 0.1
        local = [task for task in options["--tasks"].split(",") if "--include_path" in options]
        assert all((ROOT / "eval" / "benchmarks" / "tasks" / f"{task}.yaml").exists() for task in local)


def test_the_arguments_it_names_are_there():
    (named,) = re.findall(r"Other arguments: (.*?)\. An", PAGE, re.DOTALL)
    assert {*re.findall(r"`(\w+)`", named)} == KNOWN - {"pretrained", "method", "saved", "device", "batch_size"}
