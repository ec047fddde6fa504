"""The command line says what the library does: methods, models and answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from calls import shared_model
from PIL import Image
from tiny import LLAVA, picture
from typer.testing import CliRunner

import vltok
from vltok.cli import app
from vltok.drawing import draw_kept
from vltok.errors import UnsupportedInputError
from vltok.method import methods_by_name

ROOT = Path(__file__).parents[1]


def run(*words: str | Path) -> tuple[int, str]:
    """The exit code and what was printed, line breaks and runs of spaces as one space."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "250"})
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and its processor, as people have them."""
    path = tmp_path_factory.mktemp("model")
    shared_model(LLAVA).save_pretrained(path)
    LLAVA.processor().save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    picture(0, (80, 50)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys\nsys.argv = ['vltok', '--help']\nfrom vltok.__main__ import main\ntry:\n    main()\n"
        "except SystemExit:\n    print(sorted({'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(word in done.stdout for word in ("methods", "families", "check", "ask", "train", "convert", "serve"))


def test_methods_lists_every_method_and_tells_the_settings_of_one():
    code, printed = run("methods")
    assert code == 0
    for name, cls in methods_by_name().items():
        assert f"{name} {cls.__name__} {'yes' if cls.training_free else 'no'}" in printed
    code, printed = run("methods", "todre")
    assert code == 0 and all(f"{field.name}=" in printed for field in fields(vltok.ToDRE))
    code, printed = run("methods", "todra")
    assert code == 1 and "unknown method 'todra'" in printed and "todre" in printed


def test_check_says_of_each_method_whether_it_goes_on(folder):
    code, printed = run("check", folder)
    assert code == 0, printed
    assert f"vltok {vltok.__version__}" in printed and "family llava" in printed
    for name in methods_by_name():
        assert re.search(rf"\b{name} yes\b", printed), name


def test_check_of_a_model_that_is_not_supported_says_why(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 1}))
    code, printed = run("check", tmp_path)
    assert code == 1 and "not supported:" in printed and "BertModel" in printed
    code, printed = run("check", tmp_path / "nothing")
    assert code == 1 and "can't be built" in printed


def test_ask_answers_with_and_without_methods_and_draws(folder, photo, tmp_path):
    out = tmp_path / "kept.png"
    words = (
        "--method",
        "divprune,num_keep=3",
        "--method",
        "tokenpacker",
        "--compare",
        "--max-words",
        "4",
        "--out",
        out,
    )
    code, printed = run("ask", folder, photo, "w1 w2", *words)
    assert code == 0, printed
    from vltok.cli.asking import Asked

    asked, image = Asked.load(str(folder)), Image.open(photo).convert("RGB")
    plain = asked.model.generate(
        **asked.processor(images=image, text=asked.prompt("w1 w2"), return_tensors="pt"),
        max_new_tokens=4,
        do_sample=False,
    )
    assert asked.answer([image], "w1 w2", max_words=4).text == asked.processor.decode(plain[0, -4:]).strip()
    assert "none" in printed and "16 of 16" in printed and "3 of 16" in printed and "4 for 16 patches" in printed
    assert Image.open(out).size == (512, 320)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "divprune,num_kep=3"), "unknown field 'num_kep'"),
        (("--method", "nothing"), "unknown method 'nothing'"),
    ],
)
def test_ask_stops_at_what_is_wrong(folder, photo, words, told):
    code, printed = run("ask", folder, photo, "w1", *words)
    assert code == 1 and "error:" in printed and told in printed


def test_ask_names_files_that_are_no_image_and_no_model(folder, photo, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, printed = run("ask", folder, tmp_path / "broken.png", "w1")
    assert code == 1 and "broken.png can't be opened as an image" in printed
    code, printed = run("ask", tmp_path / "nothing", photo, "w1")
    assert code == 1 and "can't be loaded" in printed and "nothing" in printed


@pytest.mark.parametrize("command", ["train", "convert"])
def test_the_other_command_lines_are_reached(command):
    code, printed = run(command, "--help")
    assert code == 0 and f"vltok {command}" in printed


def test_a_drawing_fades_what_was_dropped():
    image = Image.new("RGB", (40, 20), (0, 100, 0))
    drawn = draw_kept(image, torch.tensor([1, 99]), (1, 2, 4), size=40)
    assert drawn.size == (40, 20)
    assert drawn.getpixel((15, 5)) == (0, 100, 0)  # the second of four columns
    assert drawn.getpixel((10, 0)) == (200, 30, 30)  # its frame
    faded = drawn.getpixel((25, 15))
    assert min(faded) > 150


@pytest.mark.parametrize("grid", [None, (2, 2, 2)])
def test_what_forms_no_grid_is_not_drawn(grid):
    with pytest.raises(UnsupportedInputError, match="known grid"):
        draw_kept(Image.new("RGB", (4, 4)), torch.tensor([0]), grid)
