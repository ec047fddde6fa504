"""`python -m eval.canvas --stage-2`: what stage 2 looks at after each layer, and what dropping there does."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from eval.canvas import stage2
from eval.canvas.__main__ import main
from eval.canvas.data import Canvases
from eval.canvas.model import load
from eval.canvas.runner import Result, draw_questions, encode, evaluate
from vltok.report import RelevanceRecord


def test_each_layer_but_the_last_is_looked_at_and_dropped_after():
    chosen = stage2.cases([1.0, 0.1], 6)
    assert [case.name for case in chosen] == ["never", "1", "2", "3", "4", "5"] * 2
    assert [case.keep_ratio for case in chosen] == [case.method.keep_ratio for case in chosen] == [1.0] * 6 + [0.1] * 6
    assert [case.method.layers(6) for case in chosen[:6]] == [(1, 2, 3, 4, 5), (1,), (2,), (3,), (4,), (5,)]
    assert stage2.default_layer(6) == 5 and stage2.default_layer(32) == 28


@pytest.fixture(scope="module")
def asked():
    """A few questions under every case, with the model as it is and the batches."""
    model, processor = load()
    canvases = Canvases("val", 2)
    questions = draw_questions(canvases, 8)
    batches = encode(processor, canvases, questions, 3, wrong_image=False)
    chosen = stage2.cases([1.0, 0.1], 6)
    results = [evaluate(model, processor, case, batches, questions) for case in chosen]
    return model, batches, results


@torch.no_grad()
def test_what_it_looks_at_is_the_attention_of_the_words_behind_the_picture(asked):
    model, batches, results = asked
    seen = {layer: [] for layer in range(1, 6)}
    model.set_attn_implementation("eager")
    for batch in batches:
        for row, maps in enumerate(zip(*model(**batch, output_attentions=True).attentions[:5], strict=True)):
            visual = batch["input_ids"][row] == model.config.image_token_id
            text = batch["attention_mask"][row].bool() & ~visual & (visual.cumsum(0) > 0)
            for layer, each in enumerate(maps, 1):
                seen[layer].append(float(each.mean(0)[text][:, visual].sum(1).mean()))
    model.set_attn_implementation("sdpa")
    rows = stage2.records(results)
    assert [row["dropped_after"] for row in rows] == [None, 1, 2, 3, 4, 5] * 2
    for row in rows[1:6]:
        values = seen[row["dropped_after"]]
        assert row["text_to_visual"] == pytest.approx(np.mean(values), abs=1e-4)
        low, high = sorted(values)[0], sorted(values)[-1]
        assert low < row["text_to_visual_low"] < row["text_to_visual"] < row["text_to_visual_high"] < high
        assert row["visual_to_text"] == 0  # the picture comes first
    assert [row["text_to_visual"] for row in rows[7:]] != [row["text_to_visual"] for row in rows[1:6]]


def test_layers_behind_the_drop_work_on_the_words_alone(asked):
    _, batches, results = asked
    rows = stage2.records(results)
    number = sum(len(batch["input_ids"]) for batch in batches)
    words = sum(int(batch["attention_mask"].sum()) for batch in batches) / number - 256
    per_entry = 2 * 128 * 4  # key and value, width, float32
    padded = sum(batch["input_ids"].numel() for batch in batches) / number - 256
    for tokens, own in ((256, rows[:6]), (26, rows[6:])):
        assert [row["dropped"] for row in own] == [0, 1, 1, 1, 1, 1]
        for row in own:
            layers = row["dropped_after"] or 6
            assert row["tokens_per_layer"] == pytest.approx(words + tokens * layers / 6, rel=1e-5)
            assert row["kv_bytes"] == pytest.approx(per_entry * (6 * padded + tokens * layers), rel=1e-5)


def test_the_share_of_prompts_counts_those_below_the_default_in_both_ratios():
    never, one = stage2.cases([0.1], 2)
    asked = Counter(exist=4)
    looked = [(0.05, 0.0), (0.05, 0.2), (0.3, 0.0), (0.0999, 0.0999)]
    results = [
        Result(never, asked, asked, relevance=[RelevanceRecord(1, tv, vt, False) for tv, vt in looked]),
        Result(one, Counter(exist=1), asked, relevance=[RelevanceRecord(1, *each, True) for each in looked]),
    ]
    plain, dropping = stage2.records(results)
    assert stage2.TAU == 0.1 and plain["fires_by_default"] is None
    assert dropping["fires_by_default"] == 0.5
    assert dropping["text_to_visual"] == pytest.approx(0.124975)
    assert dropping["visual_to_text"] == pytest.approx(0.074975)
    # of 0.05, 0.05, 0.0999 and 0.3: at 0.3 and 2.7 of the three steps between them
    assert dropping["text_to_visual_low"] == 0.05
    assert dropping["text_to_visual_high"] == pytest.approx(0.0999 + 0.7 * 0.2001, rel=1e-4)
    assert (plain["accuracy"], dropping["accuracy"]) == (1.0, 0.25)
    written = stage2.render([plain, dropping]).text()
    assert "50.0 %" in written and "25.0 (5-70)" in written and "never" in written


def test_the_command_writes_the_numbers_and_draws_them(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--stage-2", "--questions", "4", "--quick", "--jobs", "1", "--keep-ratios", "0.25", "--out", str(out)]
    main(arguments)
    assert "text to visual" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"stage2.json", "stage2.csv", "stage2.png"}
    written = json.loads((out / "stage2.json").read_text())
    keys = [(row["keep_ratio"], row["dropped_after"]) for row in written["results"]]
    assert keys == [(ratio, layer) for ratio in (1.0, 0.25) for layer in (None, 1, 2, 3, 4, 5)]
    assert written["settings"]["questions"] >= 4
    with (out / "stage2.csv").open() as file:
        assert [row["dropped"] for row in csv.DictReader(file)] == ["0.0", *["1.0"] * 5] * 2
    picture = np.asarray(Image.open(out / "stage2.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300 and picture.std() > 5
