"""`python -m eval.canvas`: the interval, the bookkeeping of one run, and the command line from end to end."""

import csv
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from asking import said
from PIL import Image

import vltok
from eval.canvas import plots, table
from eval.canvas.__main__ import main
from eval.canvas.data import KINDS, ONE_WORD, Canvases, Question, kinds_known
from eval.canvas.memory import early_layers_remembered
from eval.canvas.model import MODEL_DIR, load
from eval.canvas.runner import (
    FURTHER,
    METHODS,
    Case,
    Result,
    cases,
    draw_questions,
    encode,
    evaluate,
    intersection_over_union,
    kept_patches,
    time_prefill,
)
from eval.canvas.workers import Bench, Plan, run_cases
from vltok.report import RelevanceRecord

CONDENSED = [("TokenPacker", 0.25), ("average pooling", 0.25), ("TokenPacker", 0.0625), ("average pooling", 0.0625)]


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.mark.parametrize(
    ("hits", "asked", "low", "high"),
    # Wilson's interval to four digits, from Newcombe, Statistics in Medicine 17 (1998), table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_intervals(hits, asked, low, high):
    assert table.wilson(hits, asked) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_no_questions_is_not_a_number():
    assert all(math.isnan(value) for value in table.wilson(0, 0))


def test_cases_are_the_unpruned_model_a_control_every_method_at_every_ratio_and_condensing_projectors():
    every = cases([0.5, 0.1], seed=4)
    assert [case.name for case in every[:2]] == ["unpruned", "unpruned, wrong image"]
    assert all(case.is_plain for case in every[:2]) and not any(case.is_plain for case in every[2:])
    pruned, condensed = every[2:-4], every[-4:]
    assert [(case.name, case.keep_ratio) for case in pruned] == [(m, r) for r in (0.5, 0.1) for m in METHODS]
    assert all(case.method.keep_ratio == case.keep_ratio for case in pruned)
    further = cases([0.1], seed=4, every=True)
    assert [case.name for case in further[2:-4]] == [*METHODS, *FURTHER]
    assert len({repr(case.method) for case in further[2:-4]}) == len(METHODS) + len(FURTHER)
    assert pruned[-1].method == vltok.RandomTokens(keep_ratio=0.1, seed=4)
    assert [(case.name, case.keep_ratio) for case in condensed] == CONDENSED
    assert [case.condenses for case in every] == [False] * (len(every) - 4) + [True] * 4


def test_a_model_without_adapters_is_condensed_by_pooling_only():
    every = cases([0.1], seed=4, adapters=None)
    assert [(case.name, case.keep_ratio) for case in every[-2:]] == CONDENSED[1::2]
    assert all(case.adapter is None for case in every)


def test_untrained_tokenpacker_answers_as_average_pooling_before_the_models_own_projector():
    bench = Bench(Plan(MODEL_DIR, "float32", "cpu", None, 3, 20, 8))
    questions = bench.questions[:8]
    answers = []
    for method in (vltok.AveragePool(2), vltok.TokenPacker(scale_factor=2, init="pool")):
        case = Case("average pooling", 0.25, method)
        batch = bench.encode(case, questions)[0]
        with torch.no_grad(), case.put_on(bench.model, bench.processor):
            answers.append(bench.model(**batch).logits)
    torch.testing.assert_close(*answers, atol=2e-2, rtol=1e-3)


def test_condensed_cases_count_placeholders_text_and_cache_and_leave_model_and_processor_as_they_were():
    bench = Bench(Plan(MODEL_DIR, "float32", "cpu", None, 3, 20, 8))
    every = [Case("unpruned", 1.0), *cases([0.1], seed=0)[-4:]]
    projector = bench.model.model.multi_modal_projector
    results = bench.run(every, 0)
    plain = results[0]
    assert bench.processor.patch_size == 8 and bench.model.model.multi_modal_projector is projector
    assert bench.run(every[:1], 0) == [plain]
    per_entry = 6 * 2 * 128 * 4  # layers, key and value, width, float32
    for result, tokens in zip(results[1:], (64, 64, 16, 16), strict=True):
        cut = (256 - tokens) * plain.total
        assert result.total == plain.total and result.visual_tokens == tokens * plain.total
        assert result.layer_tokens == plain.layer_tokens - cut
        assert result.kv_bytes == plain.kv_bytes - per_entry * cut


def test_questions_are_those_of_whole_canvases():
    canvases = Canvases("test", 1, kinds=KINDS)
    questions = draw_questions(canvases, 23)
    last = questions[-1].canvas
    assert questions == [q for index in range(last + 1) for q in canvases.questions(index)]
    short = [q for q in questions if q.kind in ONE_WORD]
    assert len(short) >= 23 > sum(q.canvas < last for q in short)
    assert short == draw_questions(Canvases("test", 1), 23) != questions


def test_the_wrong_image_control_shows_each_question_another_canvas(shipped):
    canvases = Canvases("test", 1)
    questions = draw_questions(canvases, 12)
    shown = {}
    for wrong in (False, True):
        batches = encode(shipped[1], canvases, questions, 5, wrong)
        shown[wrong] = torch.cat([batch["pixel_values"] for batch in batches])
    assert all(not torch.equal(one, other) for one, other in zip(shown[False], shown[True], strict=True))
    first = [question.canvas for question in questions].count(0)
    assert torch.equal(shown[True][0], shown[False][first])


def test_remembered_layers_replay_equal_inputs_only_and_leave_the_model_as_it_was(shipped):
    model, processor = shipped
    canvases = Canvases("val", 2)
    batches = encode(processor, canvases, draw_questions(canvases, 8), 4, wrong_image=False)[:2]
    tower = model.model.vision_tower
    before = dict(tower.named_modules())
    with torch.inference_mode():
        plain = [tower(batch["pixel_values"], output_hidden_states=True).hidden_states for batch in batches]
        with early_layers_remembered(model):
            calls = []
            attention = tower.encoder.layers[0].self_attn.inner
            hook = attention.register_forward_hook(lambda *_: calls.append(1))
            for _ in range(3):
                for batch, expected in zip(batches, plain, strict=True):
                    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
                    assert len(states) == 6 and all(map(torch.equal, states, expected))
            assert len(calls) == 2
            nudged = batches[0]["pixel_values"].clone()
            nudged[3, 2, 100, 100] += 0.5
            assert not torch.equal(tower(nudged, output_hidden_states=True).hidden_states[-2], plain[0][-2])
            hook.remove()
    after = dict(tower.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_several_processes_count_what_one_counts():
    bench = Bench(Plan(MODEL_DIR, "float32", "cpu", None, 3, 20, 1))
    every = [Case("unpruned", 1.0), Case("random", 0.05, vltok.RandomTokens(keep_ratio=0.05))]
    seen = []
    one, two = (run_cases(bench, every, jobs, seen.append) for jobs in (1, 2))
    assert one == two
    assert sum(seen) == 2 * 2 * len(bench.questions) and one[0].total == len(bench.questions)


def test_evaluate_counts_hits_tokens_and_cache_bytes(shipped):
    model, processor = shipped
    canvases = Canvases("val", 2, kinds=kinds_known(processor.tokenizer.get_vocab()))
    questions = draw_questions(canvases, 14)
    batches = encode(processor, canvases, questions, 4, wrong_image=False)
    hooks = len(model._forward_hooks)
    plain = evaluate(model, processor, Case("unpruned", 1.0), batches, questions)
    pruned = evaluate(model, processor, Case("stride", 0.25, vltok.StrideTokens(keep_ratio=0.25)), batches, questions)
    assert len(model._forward_hooks) == hooks

    right = Counter()
    for question in questions:  # one by one, by hand
        words = said(model, processor, canvases, question)
        right[question.kind] += words == question.answer
        right["box_iou"] += (
            question.kind == "box" and 2 * intersection_over_union(words.split(), question.answer.split()) >= 1
        )
    assert plain.hits == right
    assert plain.total == len(questions) and plain.visual_tokens == 256 * len(questions)
    per_entry = 6 * 2 * 128 * 4  # layers, key and value, width, float32
    assert plain.kv_bytes == sum(per_entry * batch["input_ids"].numel() for batch in batches)
    text = sum(len(question.text.split()) + 1 for question in questions)
    assert plain.layer_tokens == text + 256 * len(questions)
    assert pruned.visual_tokens == 64 * len(questions) and pruned.layer_tokens == text + 64 * len(questions)
    assert pruned.kv_bytes == plain.kv_bytes - per_entry * 192 * len(questions)


def test_prefill_ratios_and_kept_patches_come_one_per_case_and_picture(shipped):
    model, processor = shipped
    canvases = Canvases("val", 2)
    questions = draw_questions(canvases, 4)[:4]
    batch = encode(processor, canvases, questions, 4, wrong_image=False)[0]
    every = cases([0.1], 0)[2:]
    others = []
    for case in every:
        with case.put_on(model, processor):
            others.append((case, encode(processor, canvases, questions, 4, wrong_image=False)[0]))
    ratios = time_prefill(model, processor, batch, others, rounds=1)
    assert processor.patch_size == 8
    assert len(ratios) == len(every) and all(ratio > 0 for ratio in ratios)
    kept = kept_patches(model, every[0], batch)
    assert [len(positions) for positions in kept] == [26] * 4
    assert all(positions == sorted(set(positions)) and 0 <= positions[0] <= positions[-1] < 256 for positions in kept)


def _result(name, ratio, hits):
    asked = Counter({"exist": 10, "quadrant": 5, "where": 4})
    return Result(Case(name, ratio), Counter(hits), asked, visual_tokens=1900, layer_tokens=950.0, kv_bytes=19 * 2048)


def test_fewer_pixels_are_no_row_of_the_table_as_the_resolution_is_fixed(shipped):
    with pytest.raises(vltok.errors.UnsupportedModelError, match="as many visual tokens"):
        vltok.resize(shipped[1], 0.5)


def test_records_relate_accuracy_to_the_unpruned_model_and_costs_to_one_question():
    rows = table.records(
        [
            _result("unpruned", 1.0, {"exist": 8, "quadrant": 0, "where": 4, "count": 0}),
            _result("random", 0.1, {"exist": 6, "quadrant": 1, "where": 1, "count": 0}),
        ]
    )
    assert rows[1]["exist_accuracy"] == 0.6 and rows[1]["exist_of_unpruned"] == 0.75
    assert rows[1]["quadrant_of_unpruned"] is None and rows[1]["count_accuracy"] is None
    assert (rows[1]["visual_tokens"], rows[1]["tokens_per_layer"], rows[1]["kv_bytes"]) == (100, 50, 2048)
    assert rows[1]["accuracy"] == pytest.approx(8 / 19, rel=1e-5)
    text = table.render(rows).text()
    assert "60.0 (31-83)" in text and "Questions: 10 exist, 5 quadrant, 4 where\n" in text
    assert not re.search(r"\b(count|box|read)\b", text), "nobody asked these"


@pytest.mark.parametrize(
    ("answer", "right", "share"),
    [
        ("2 3 5 6", "2 3 5 6", 1.0),
        ("2 3 5 6", "3 3 5 6", 12 / 16),
        ("2 3 5 6", "3 3 6 6", 12 / 20),
        ("2 3 5 6", "6 3 9 6", 0.0),
        ("5 3 2 6", "2 3 5 6", 0.0),  # the last column before the first
        ("0 0 15 15", "4 4 4 4", 1 / 256),
        ("2 3 </s> <pad>", "2 3 5 6", 0.0),
        ("2 3 seven 6", "2 3 5 6", 0.0),
        ("", "2 3 5 6", 0.0),
    ],
)
def test_the_overlap_of_boxes_counts_their_patches(answer, right, share):
    boxes = [answer.split(), right.split()]
    assert intersection_over_union(*boxes) == pytest.approx(share)
    if all(word.isdecimal() for word in boxes[0]) and boxes[0]:
        left, top, last, bottom = ([int(box[k]) for box in boxes] for k in range(4))
        patches = [
            {(x, y) for x in range(left[k], last[k] + 1) for y in range(top[k], bottom[k] + 1)} for k in range(2)
        ]
        shared = len(patches[0] & patches[1]) / len(patches[0] | patches[1])
        assert intersection_over_union(*boxes) == pytest.approx(shared if all(patches) else 0.0)


def test_answers_of_several_words_are_right_as_a_whole_and_boxes_also_by_overlap():
    result = Result(Case("", 1.0))
    pairs = (("box", "1 2 3 4"), ("read", "three seven"), ("exist", "yes"))
    box, read, word = (Question(kind, "", answer, 0) for kind, answer in pairs)
    result.note(box, ["1", "2", "3", "4", "</s>"])
    result.note(box, ["1", "2", "3", "6", "</s>"])  # 9 of 15 patches
    result.note(box, ["1", "2", "3", "9", "</s>"])  # 9 of 24
    result.note(box, ["1", "2", "</s>", "<pad>", "<pad>"])
    result.note(read, ["three", "seven", "</s>"])
    result.note(read, ["seven", "three", "</s>"])
    result.note(word, ["yes", "</s>"])
    assert result.asked == {"box": 4, "box_iou": 4, "read": 2, "exist": 1} and result.total == 7
    assert result.hits == {"box": 1, "box_iou": 2, "read": 1, "exist": 1}
    assert result.overall() == pytest.approx(3 / 7)


def test_the_note_on_stage_2_counts_what_it_dropped():
    looked = _result("ToDRE, stages 1+2", 0.1, {"exist": 6, "quadrant": 1, "where": 1, "count": 0})
    looked.relevance = [RelevanceRecord(5, 0.1, 0.0, True)] * 5 + [RelevanceRecord(5, 0.4, 0.0, False)] * 14
    plain = _result("unpruned", 1.0, {"exist": 8, "quadrant": 0, "where": 4, "count": 0})
    assert table.stage2_note(table.records([plain])) == []
    (note,) = table.stage2_note(table.records([plain, looked]))
    assert "dropped the visual tokens of 5 of 19 prompts" in note and "32 to 32 %" in note


def test_the_command_writes_the_table_and_draws_the_pictures(tmp_path, capsys):
    out = tmp_path / "out"
    main(["--questions", "8", "--keep-ratios", "0.1", "--quick", "--jobs", "1", "--out", str(out)])
    assert "unpruned, wrong image" in capsys.readouterr().out
    written = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in written["results"]] == [
        "unpruned",
        "unpruned, wrong image",
        *METHODS,
        *(name for name, _ in CONDENSED),
    ]
    assert written["settings"]["questions"] >= 8 and written["settings"]["split"] == "test"
    with (out / "results.csv").open() as file:
        flat = list(csv.DictReader(file))
    assert [float(row["visual_tokens"]) for row in flat] == [256, 256] + [26] * 8 + [25, 26] + [64, 64, 16, 16]
    for name in ("accuracy.png", "kept.png"):
        picture = np.asarray(Image.open(out / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300 and picture.std() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-ratios", "0.5,2"], "numbers in"),
        (["--dtype", "int8"], "float32"),
        (["--questions", "0"], "--questions"),
        (["--stage-2", "--all"], "--all"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_items_that_the_model_has_no_words_for_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "items.npz", images=images, labels=np.arange(40) % 2, names=np.array(["shoe", "bag"]))
    with pytest.raises(SystemExit) as error:
        main(["--items", str(tmp_path / "items.npz")])
    assert error.value.code == 2 and "shoe" in capsys.readouterr().err


def test_the_overlay_shows_kept_patches_unchanged_and_fades_the_others():
    image = np.random.default_rng(0).integers(0, 60, (128, 128, 3), dtype=np.uint8)
    shown = plots._dim_dropped(image, [17])  # row 1, column 1
    assert np.array_equal(shown[8:16, 8:16], image[8:16, 8:16])
    shown[8:16, 8:16] = 255
    assert shown.min() > 170
