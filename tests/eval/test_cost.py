"""The costs that `eval.cost` tells: operations as torch counts them, parts that add up, words that fit the numbers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vltok
from eval.cost import __main__ as command
from eval.cost import bench, flops, parts, report, shapes
from eval.cost.bench import Bench, Case, Row, cases
from vltok.errors import VltokError

SIDES = {"llava-1.5-7b": 336, "llava-next-7b": 672, "qwen2.5-vl-7b": 280, "qwen3-vl-8b": 160}


def small(name: str, attention: str = "eager", text_tokens: int = 12) -> Bench:
    """A sixteenth of a shape, but with all kinds of layers that its tower has."""
    shape = replace(shapes.SHAPES[name].scaled(1 / 16), tower_layers=4)
    model = shapes.build(shape, attention)
    inputs = shapes.prompt(model, SIDES[name], text_tokens)
    return Bench(model, lambda: inputs, new_tokens=4)


@pytest.fixture(scope="module")
def llava() -> Bench:
    return small("llava-1.5-7b", "sdpa")


def counted(bench: Bench, case: Case, new_tokens: int) -> int:
    with bench.on(case), FlopCounterMode(display=False) as counter:
        bench.answer(case, bench.inputs, new_tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SIDES)
def test_operations_are_those_that_torch_counts(name):
    own = small(name)
    layers, length = own.model.config.get_text_config().num_hidden_layers, own.inputs["input_ids"].shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes.features(own.model, own.inputs)
    found = flops.count(own.model, own.inputs, [length] * layers)
    assert found.tower + found.projector == pytest.approx(counter.get_total_flops(), rel=0.02)
    first, second = (counted(own, Case("unpruned"), n) for n in (1, 2))
    assert report.before_first(found) == pytest.approx(first, rel=0.02)
    assert found.decode == pytest.approx(second - first, rel=0.02)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("stride,keep_ratio=0.25", 0),
        # FastV multiplies a layer's tokens by its query, key and value weights once more, which isn't counted.
        ("fastv,keep_ratio=0.25,layer=1", 2 * 3 * 588 * 256**2),
    ],
)
def test_operations_of_a_pruned_prompt_are_those_that_torch_counts(method, own):
    pruned, case = small("llava-1.5-7b"), Case("pruned", method)
    first, second = (counted(pruned, case, n) for n in (1, 2))
    with pruned.on(case) as handle:
        pruned.answer(case, pruned.inputs, 1)
        tokens = handle.report(file=None).tokens_per_layer[0].tolist()
    found = flops.count(pruned.model, pruned.inputs, tokens)
    assert report.before_first(found) + own == pytest.approx(first, rel=0.02)
    assert found.decode == pytest.approx(second - first, rel=0.02)


def test_other_models_and_depths_are_not_counted(llava):
    with pytest.raises(ValueError, match="layers, got tokens of 1"):
        flops.count(llava.model, llava.inputs, [5])
    other = torch.nn.Module()
    other.config = type("Config", (), {"model_type": "gemma3"})
    with pytest.raises(ValueError, match="got gemma3"):
        flops.count(other, {}, [])


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b", 7.06), ("llava-next-7b", 7.06), ("qwen2.5-vl-7b", 8.29), ("qwen3-vl-8b", 8.77)],
)
def test_full_shapes_have_as_many_parameters_as_the_models_are_said_to_have(name, billions):
    with torch.device("meta"):
        model = shapes.build(shapes.SHAPES[name])
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_scaling_keeps_the_shares_of_the_work():
    whole = shapes.SHAPES["llava-1.5-7b"]
    assert whole.scaled(1) == whole
    half = whole.scaled(0.5)
    assert (half.layers, half.heads, half.ffn, half.tower_layers, half.tower_heads) == (16, 16, 5504, 12, 8)
    assert half.vocabulary == 8000  # of 8016, in steps of 64
    assert (half.tower_head, half.side) == (whole.tower_head, whole.side)
    assert shapes.SHAPES["qwen2.5-vl-7b"].scaled(0.5).kv_heads == 2


@pytest.mark.parametrize(("name", "side"), [("llava-1.5-7b", 224), ("qwen3-vl-8b", 100)])
def test_an_image_that_does_not_fit_is_refused(name, side):
    model = shapes.build(shapes.SHAPES[name].scaled(1 / 32))
    with pytest.raises(ValueError, match=f"got {side}"):
        shapes.prompt(model, side, 8)


def test_an_inner_section_is_no_part_of_the_outer_one():
    ticks = itertools.count()
    sections = parts.Sections(lambda: float(next(ticks)))
    with sections.section("other"), sections.section("prefill"):
        for _ in range(2):
            with sections.section("tower"):
                next(ticks)
    assert sections.seconds == {"other": 2, "prefill": 3, "tower": 4}  # 9 ticks from the first to the last


@pytest.mark.parametrize("method", [None, "divprune,keep_ratio=0.25", "fastv,keep_ratio=0.25,layer=1"])
def test_parts_add_up_to_the_whole_and_leave_no_hooks(llava, method):
    ticks = itertools.count()
    sections, before = parts.Sections(lambda: float(next(ticks))), hooks(llava.model)
    with llava.on(Case("case", method)) as handle, parts.watch(llava.model, handle, sections):
        start = next(ticks)
        with sections.section("other"):
            llava.answer(Case("case", method), llava.inputs)
        assert sum(sections.seconds.values()) == next(ticks) - start - 2  # the clock's own ticks, all but the ends
    assert set(sections.seconds) == set(parts.PARTS) - ({"selector"} if method is None else set())
    assert sections.seconds["decode"] == 3  # three tokens behind the first, one tick each
    assert hooks(llava.model) == before
    assert "pick" not in vars(vltok.DivPrune)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_selector_is_timed_where_it_picks(llava, monkeypatch):
    now = [0.0]
    plain = vltok.DivPrune.select
    monkeypatch.setattr(vltok.DivPrune, "select", lambda *given: now.__setitem__(0, now[0] + 5) or plain(*given))
    sections, case = parts.Sections(lambda: now[0]), Case("case", "divprune,num_keep=9")
    with llava.on(case) as handle, parts.watch(llava.model, handle, sections), sections.section("other"):
        llava.answer(case, llava.inputs)
    assert sections.seconds["selector"] == 5
    assert sum(sections.seconds.values()) == 5


def test_a_natively_short_prompt_costs_the_cache_what_the_pruned_one_does(llava):
    asked = [Case("unpruned"), *cases(["stride"], [0.25])[1:]]
    rows = llava.measure(asked, rounds=1, seconds=1.0)
    assert [row.case for row in rows] == ["unpruned", "stride 0.25", "short prompt, 144 visual"]
    base, pruned, native = rows
    assert [row.visual_tokens for row in rows] == [576, 144, 144]
    layers, width = llava.model.config.text_config.num_hidden_layers, 256  # two heads
    assert base.kv_bytes == layers * (576 + 12) * width * 2 * 4
    assert pruned.kv_bytes == native.kv_bytes == layers * (144 + 12) * width * 2 * 4
    assert pruned.flops == native.flops
    assert pruned.to_native is not None and base.to_native is None and native.to_native is None
    assert all(row.parts_to_whole == pytest.approx(1, abs=0.05) for row in rows)
    assert min(base.peak_bytes, pruned.peak_bytes, native.peak_bytes) > base.kv_bytes / 4


@torch.no_grad()
def test_the_natively_short_prompt_is_what_pruning_leaves(llava, monkeypatch):
    case = Case("pruned", "stride,num_keep=64,positions=reindex")
    with llava.on(case) as handle:
        pruned = llava.model(**llava.inputs, logits_to_keep=1).logits
        kept = handle.report(file=None).keep_indices[0][0]
    encoded = torch.cat(shapes.features(llava.model, llava.inputs))
    logits = []
    for order in (kept, kept.flip(0)):
        monkeypatch.setattr(bench, "features", lambda *_, order=order: [torch.cat([encoded[order], encoded[64:]])])
        logits.append(llava.model(**llava.native(64), logits_to_keep=1).logits)
    torch.testing.assert_close(logits[0], pruned, rtol=1e-4, atol=1e-5)
    assert (logits[1] - pruned).abs().max() > 1e-3  # the comparison sees another order of the same tokens


def test_every_method_comes_at_every_budget_and_once_with_its_own():
    found = [(case.name, case.method) for case in cases(["divprune", "todre,num_keep=9", "tap"], [0.5, 0.1])]
    assert found == [
        ("unpruned", None),
        ("divprune 0.5", "divprune,keep_ratio=0.5"),
        ("divprune 0.1", "divprune,keep_ratio=0.1"),
        ("todre,num_keep=9", "todre,num_keep=9"),
        ("tap", "tap"),
    ]
    with pytest.raises(VltokError, match="unknown method 'divprun'"):
        cases(["divprun"], [0.5])


def row(case: str = "unpruned", ratios: tuple[float, float, float] = (1.0, 1.0, 1.0), **changes) -> Row:
    times = {"tower": 10.0, "projector": 5.0, "selector": 0.0, "prefill": 85.0, "decode": 50.0, "other": 1.0}
    sizes = {"visual_tokens": 90, "kv_bytes": 100, "parts_to_whole": 1.0, "hooks_to_whole": 1.0} | changes
    times |= sizes.pop("milliseconds", {})
    rest = {"per_token": 1.0, "first_to_unpruned": 1.0, "to_native": None, "decode_to_native": None, "peak_bytes": 1}
    return Row(case=case, milliseconds=times, to_unpruned=ratios, flops=None, full_flops=None, **rest, **sizes)


def test_the_words_say_where_pruning_pays():
    said = report.words(
        [
            row(),
            row("good", (0.5, 0.6, 0.7), milliseconds={"selector": 3.0, "prefill": 40.0}, kv_bytes=30),
            row("even", (0.9, 1.0, 1.1)),
            row("bad", (1.1, 1.2, 1.3), milliseconds={"selector": 30.0, "prefill": 84.0}),
        ],
        prompt_tokens=100,
    )
    assert "90 % of the prompt" in said[0] and "15 % of the time" in said[0] and "6.7 times as fast" in said[0]
    assert said[1] == (
        "good: pays, the answer takes 0.60 of the time; picking takes 3.0 ms and the prefill 45.0 ms less; "
        "the KV cache is 0.30 of the unpruned one."
    )
    assert "even: makes no clear difference" in said[2]
    assert "bad: does not pay in time" in said[3]
    assert len(said) == 4


@pytest.mark.parametrize(
    ("changes", "tokens", "word"),
    [
        ({"milliseconds": {"tower": 200.0}}, 100, "Tower-bound"),
        ({}, 400, "Mostly text"),
        ({"parts_to_whole": 0.9}, 100, "the parts add up to"),
        ({"hooks_to_whole": 1.2}, 100, "hooks, or noise"),
    ],
)
def test_the_words_say_why_not(changes, tokens, word):
    assert not any(word in line for line in report.words([row()], 100))
    assert any(word in line for line in report.words([row(**changes)], tokens))


def test_the_command_writes_a_table_a_picture_and_json(tmp_path, capsys):
    small = [
        "--scale",
        "0.0625",
        "--methods",
        "stride;fastv,layer=1",
        "--keep-ratios",
        "0.1",
        "--rounds",
        "1",
        "--quick",
    ]
    command.main([*small, "--out", str(tmp_path)])
    content = json.loads((tmp_path / "cost.json").read_text())
    assert [each["case"] for each in content["rows"]] == [
        "unpruned",
        "stride 0.1",
        "fastv,layer=1 0.1",
        "short prompt, 58 visual",
    ]
    assert content["rows"][0]["full_flops"]["prefill"] > 1000 * content["rows"][0]["flops"]["prefill"]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cost.md").read_text().count("\n|") >= 5
    assert "Visual tokens are 94 % of the prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--new-tokens", "1"], "at least 2"),
        (["--scale", "2"], "must be numbers in (0, 1]"),
        (["--shape", "gpt"], "invalid choice: 'gpt'"),
    ],
)
def test_a_setting_out_of_range_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(argv)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_method_ends_the_command_with_a_sentence():
    with pytest.raises(SystemExit, match="error: unknown method 'nothing'"):
        command.main(["--scale", "0.03", "--methods", "nothing"])
