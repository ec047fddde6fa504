"""The serving benchmark's ratios are those of a round, its cases can be served, its table says what was measured."""

from __future__ import annotations

import json

import pytest
import typer
from transformers import AutoConfig, AutoProcessor
from transformers.models.llava import LlavaConfig

from eval.canvas.data import Canvases
from eval.serving import report
from eval.serving.__main__ import cases_of, main
from eval.serving.engine import Load, Settings, picture, prompt_of
from eval.serving.model import Shape, described, write
from vltok.serving import vllm_overrides

SMALL = Shape(layers=1, width=64, tower_layers=2, tower_width=64, side=4)


def loads(seconds: float, encoder: float = 0.5, blocks: int = 100, prompt: float = 600) -> list[Load]:
    """What a round gave at one concurrency."""
    return [Load(8, 16, seconds, seconds / 4, prompt, blocks, encoder, 10)]


ROUNDS = {
    "unpruned": [loads(8.0), loads(16.0), loads(10.0)],
    "divprune,keep_ratio=0.1": [loads(*each, 0.6, 20, 80) for each in [(2.0,), (2.0,), (5.0,)]],
}


def test_ratios_are_within_a_round_and_their_median_counts():
    plain, pruned = report.rows(ROUNDS, {"unpruned": 0.9})
    assert (plain.per_second, plain.first_token, plain.kv_blocks, plain.encoder) == (1.0, 1.0, 1.0, 1.0)
    assert pruned.per_second == 4.0, "4, 8 and 2 times as many"
    assert pruned.first_token == pytest.approx(0.25)
    assert pruned.kv_blocks == pytest.approx(0.2)
    assert pruned.encoder == pytest.approx(1.2)
    assert pruned.encoder_share == pytest.approx(0.3)
    assert pruned.seconds == pytest.approx(2 / 16)
    assert (plain.accuracy, pruned.accuracy) == (0.9, None)


def test_the_table_has_a_cell_for_each_word_of_its_head():
    table = report.rows(ROUNDS, {"unpruned": 0.9})
    head, line, *rest = report.markdown(table).splitlines()
    assert [len(row.split("|")) for row in (head, line, *rest)] == [len(report.HEAD) + 2] * 4
    assert rest[1].startswith("| divprune,keep_ratio=0.1 | 8 | 4.00 | 0.25 | 80 |")


def test_the_picture_is_drawn(tmp_path):
    report.plot(report.rows(ROUNDS, {}), tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_each_method_is_served_at_each_ratio():
    cases = cases_of("divprune;todre,relevance=False", "0.25,0.1")
    assert cases[:2] == ["divprune,keep_ratio=0.25", "todre,relevance=False,keep_ratio=0.25"]
    assert len({json.dumps(vllm_overrides("llava", case)) for case in cases}) == 4


@pytest.mark.parametrize(("methods", "ratios"), [("fastv", "0.1"), ("divprune", "2"), ("divprune", "a"), ("", "0.1")])
def test_what_can_not_be_served_is_no_case(methods, ratios):
    with pytest.raises(typer.BadParameter):
        cases_of(methods, ratios)


def test_the_model_has_the_layout_of_llava(tmp_path):
    write(SMALL, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlavaConfig)
    assert described(SMALL)["visual_tokens"] == 16
    processor = AutoProcessor.from_pretrained(tmp_path)
    prompt = prompt_of(Settings(str(tmp_path), None)).format("what is in the top-left")
    inputs = processor(text=prompt, images=picture(Canvases("test"), 3), return_tensors="pt")
    assert int((inputs["input_ids"] == config.image_token_index).sum()) == 16
    assert inputs["pixel_values"].shape[-2:] == (56, 56)
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


def test_a_chat_template_writes_the_prompt(tmp_path):
    write(SMALL, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.chat_template = "{u} {% for part in messages[0].content %}{{ part.text or '<image>' }} {% endfor %}A:"
    processor.save_pretrained(tmp_path)
    assert prompt_of(Settings(str(tmp_path), None)).format("a b") == "{u} <image> a b A:"


def test_the_default_tower_has_a_small_share_of_the_work():
    shape = Shape()
    tower = 12 * shape.tower_layers * shape.tower_width**2
    decoder = shape.layers * shape.width**2 * (4 + 3 * 11 / 4)
    assert shape.width % 64 == shape.tower_width % 64 == 0
    assert 0.02 < tower / decoder < 0.06, "as in LLaVA-1.5-7B, 0.3 of 6.5 billion weights"


def test_the_command_describes_its_options():
    app = typer.Typer()
    app.command()(main)
    from typer.testing import CliRunner

    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["--concurrency", "0"]).exit_code == 2
