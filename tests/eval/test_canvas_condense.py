"""Training of condensing projectors on the canvas model: pooling, shorter sequences, runs, adapters, the command."""

import json
from collections import Counter

import pytest
import torch
from asking import said
from safetensors.torch import load_file

import vltok
from eval.canvas import condense, condense_table
from eval.canvas.attention import use_block_attention
from eval.canvas.batches import BatchStream
from eval.canvas.condense import Learner, Run, main, settings, ship, tower_states, train
from eval.canvas.data import KINDS, Canvases, kinds_known
from eval.canvas.losses import answer_loss
from eval.canvas.model import load
from eval.canvas.runner import ADAPTERS, SCALES, draw_questions
from eval.canvas.steps import Phase
from eval.canvas.variants import Variant, levels, tokens_at
from eval.store import Store

BUDGET = Phase("condense", 2, 2, 0.01, 1e-3, 0.0, min_items=1)
VARIANTS = [Variant("average", 1), Variant("average", 4), Variant("tokenpacker", 4)]
SEVERAL = Variant("tokenpacker", (2, 4))


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch):
    monkeypatch.setattr(condense, "VAL_BATCHES", 1)


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.fixture(scope="module")
def batch(shipped):
    tokenizer = shipped[1].tokenizer
    return BatchStream(Canvases("train", 1, kinds=kinds_known(tokenizer.get_vocab())), tokenizer, 3, 2, 9)[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of every variant, side by side, in both parts."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condense, "VAL_BATCHES", 1)
        for part in ("projector", "lm"):
            train([Run(variant, part, 0) for variant in VARIANTS], BUDGET, out)
    return out


@pytest.mark.parametrize("variant", [Variant("tokenpacker", 2), Variant("average", 4)], ids=lambda v: v.name)
def test_each_block_of_a_shorter_sequence_gives_the_logits_that_the_model_gives_alone(variant, batch):
    model, processor = load()
    projector = variant.put_on(model, processor)
    shorter = batch.condensed(tokens_at(variant.scale))
    with torch.no_grad():
        states = tower_states(model, batch)
        features = torch.cat([states[level][:, 1:] for level in levels(model)], dim=-1)
        projected, decoder = projector(features), model.model.language_model
        prefix = 1 + tokens_at(variant.scale)
        words = decoder.embed_tokens(shorter.input_ids)
        embeds = torch.cat([words[:, :1], projected, words[:, prefix:]], dim=1)
        use_block_attention(decoder)
        arguments = {"attention_mask": shorter.attention_mask(), "position_ids": shorter.position_ids}
        hidden = decoder(inputs_embeds=embeds, use_cache=False, prefix=prefix, **arguments).last_hidden_state
        together = model.lm_head(hidden)[0]
        decoder.config._attn_implementation = "sdpa"
        for block in range(1, int(shorter.block[0].max()) + 1):
            at = (shorter.block[0] == block).nonzero().flatten()
            text = processor.tokenizer.decode(shorter.input_ids[0, at])
            picture = ((batch.pixels[0] * 0.25 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
            inputs = processor(images=[picture], text=[f"<image> {text}"], return_tensors="pt")
            assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens_at(variant.scale)
            alone = model(**inputs).logits[0, prefix:]
            torch.testing.assert_close(together[at], alone, atol=5e-4, rtol=1e-3)


def test_shorter_sequences_keep_questions_and_targets(batch):
    shorter = batch.condensed(16)
    for name in ("input_ids", "block", "target", "kind"):
        assert torch.equal(getattr(shorter, name)[:, 17:], getattr(batch, name)[:, 257:])
        assert torch.equal(getattr(shorter, name)[:, :17], getattr(batch, name)[:, :17])
    assert torch.equal(shorter.position_ids[:, :17], torch.arange(17).expand(3, -1))
    assert torch.equal(shorter.position_ids[:, 17:], batch.position_ids[:, 257:] - 240)
    assert shorter.patch_label is batch.patch_label and batch.input_ids.shape[1] > 257


def _read(folder, run, scale, budget=BUDGET):
    return Store(folder).read(run.name, settings(run, scale, budget))


def test_tokenpacker_and_average_pooling_start_from_the_same_answers(runs):
    pooling, packer = (_read(runs, Run(variant, "projector", 0), 4) for variant in VARIANTS[1:])
    assert packer["untrained"] == pytest.approx(pooling["untrained"], abs=1e-3)
    assert packer["val"]["loss"] != pytest.approx(pooling["val"]["loss"], abs=1e-3)


def test_a_run_beside_others_ends_with_the_weights_it_gets_alone(runs, tmp_path):
    run = Run(VARIANTS[2], "projector", 0)
    train([run], BUDGET, tmp_path)
    alone, beside = (load_file(folder / f"{run.name}.safetensors") for folder in (tmp_path, runs))
    assert alone.keys() == beside.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], beside[name], msg=name)


def test_part_projector_trains_the_projector_alone_and_part_lm_the_language_model_too(runs, shipped):
    for variant in VARIANTS:
        torch.manual_seed(0)
        model, processor = load()
        projector = variant.put_on(model, processor)
        fresh = {f"0.{name}": p for name, p in projector.named_parameters()}
        fresh |= {f"1.{name}": p for name, p in model.model.language_model.named_parameters()}
        for part, prefixes in (("projector", "0"), ("lm", "01")):
            trained = load_file(runs / f"{Run(variant, part, 0).name}.safetensors")
            assert set(trained) == {name for name in fresh if name[0] in prefixes}
            assert [name for name in trained if torch.equal(trained[name], fresh[name])] == []


def test_the_runs_of_a_seed_learn_from_the_same_batches_and_another_seed_from_others(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(Learner, "step", lambda self, number, states, batch: seen.append(batch.pixels) or 0.0)
    for seed in (0, 1):
        train([Run(variant, "projector", seed) for variant in VARIANTS[1:]], BUDGET, tmp_path)
    assert len(seen) == 2 * 2 * 2
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])


def test_training_canvases_are_none_that_the_model_was_trained_on():
    assert condense.FIRST_SEED > 4  # its four phases drew from seeds 1 to 4


def test_a_projector_for_several_scales_is_trained_tested_and_shipped_for_each(tmp_path):
    arguments = ["--out", str(tmp_path), "--kinds", "tokenpacker,shuffle", "--scales", "4,2+4", "--seeds", "0"]
    arguments += ["--parts", "projector", "--steps", "2", "--batch-size", "1", "--questions", "4"]
    main([*arguments, "--adapters", str(tmp_path / "adapters")])
    seen = {}
    for path in tmp_path.glob("projector-*.json"):
        record = json.loads(path.read_text())
        point = (record["settings"]["kind"], record["settings"]["tokens"])
        seen[point] = seen.get(point, {}) | record["result"]
    assert set(seen) == {("tokenpacker", 16), ("shuffle", 16), ("tokenpacker-s2+4", 64), ("tokenpacker-s2+4", 16)}
    for figures in seen.values():
        assert sum(figures["asked"].values()) >= 4 and figures["val"]["loss"] > 0
    names = {"tokenpacker-s4", "shuffle-s4", "tokenpacker-s2+4"}
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == names
    model, processor = load()
    with vltok.load(model, tmp_path / "adapters" / "tokenpacker-s2+4", processor=processor) as handle:
        assert handle.methods[0].scale_factor == (2, 4)


def test_a_learner_of_several_scales_lowers_its_loss_at_each(shipped, batch):
    base, _ = load()
    base.requires_grad_(False)
    use_block_attention(base.model.language_model)
    learner = Learner(Run(SEVERAL, "projector", 0), base, Phase("condense", 12, 3, 0.01, 1e-3, 0.0, min_items=1))
    seen = [(tower_states(base, batch), batch)]
    before = learner.validate(seen)
    for number in range(12):
        learner.step(number, *seen[0])
    after = learner.validate(seen)
    assert before.keys() == after.keys() == {2, 4}
    assert all(after[scale]["loss"] < 0.8 * before[scale]["loss"] for scale in after)


def test_a_learner_lowers_its_loss(shipped, batch):
    base, _ = load()
    base.requires_grad_(False)
    use_block_attention(base.model.language_model)
    budget = Phase("condense", 8, 3, 0.01, 1e-3, 0.0, min_items=1)
    learner = Learner(Run(Variant("tokenpacker", 4), "projector", 0), base, budget)
    states = tower_states(base, batch)
    losses = [learner.step(number, states, batch) for number in range(8)]
    assert losses[-1] < 0.6 * losses[0]
    assert learner.seconds > 0


def test_a_loss_that_is_not_finite_stops_the_run(shipped, batch):
    base, _ = load()
    learner = Learner(Run(VARIANTS[1], "projector", 0), base, BUDGET)
    with pytest.raises(FloatingPointError, match="projector-average-s4-seed0"):
        learner.step(0, [states * torch.nan for states in tower_states(base, batch)], batch)


def test_an_adapter_holds_the_trained_weights_in_bfloat16(runs, tmp_path):
    run = Run(VARIANTS[2], "projector", 0)
    folder = ship(run, runs, tmp_path)
    assert folder.name == "tokenpacker-s4"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * 2**20
    model, processor = load()
    trained = load_file(runs / f"{run.name}.safetensors")
    with vltok.load(model, folder, processor=processor) as handle:
        for name, value in handle.added_modules[0].state_dict().items():
            assert torch.equal(value, trained[f"0.{name}"].bfloat16().float()), name
    assert processor.patch_size == 8


def test_a_test_answers_with_the_trained_weights_through_generate(runs, batch):
    run = Run(VARIANTS[2], "lm", 0)
    result = condense.test(run, 4, runs, questions=8, seed=1)
    assert sum(result.asked.values()) >= 8 and result.visual_tokens == 16 * result.total
    model, processor = load()
    run.variant.put_on(model, processor).load_state_dict(
        {k[2:]: v for k, v in load_file(runs / f"{run.name}.safetensors").items() if k.startswith("0.")}
    )
    language = {k[2:]: v for k, v in load_file(runs / f"{run.name}.safetensors").items() if k.startswith("1.")}
    model.model.language_model.load_state_dict(language)
    canvases = Canvases("test", 1, kinds=kinds_known(processor.tokenizer.get_vocab()))
    right = Counter()
    for question in draw_questions(canvases, 8):
        right[question.kind] += said(model, processor, canvases, question) == question.answer
    assert {kind: result.hits[kind] for kind in KINDS} == {kind: right[kind] for kind in KINDS}


def test_the_command_trains_tests_and_prints_and_skips_finished_runs(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--scales", "1,4", "--seeds", "0", "--parts", "projector", "--steps", "1"]
    arguments += ["--batch-size", "1", "--questions", "4", "--adapters", str(tmp_path / "adapters")]
    main(arguments)
    printed = capsys.readouterr().out
    runs = [Run(variant, "projector", 0) for variant in VARIANTS]
    budget = Phase("condense", 1, 1, 0.005, 1e-3, 0.0, min_items=1)
    for run in runs:
        assert _read(tmp_path, run, run.variant.scale, budget)["val"]["loss"] > 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {record["run"] for record in log} == {run.name for run in runs}
    assert (tmp_path / "adapters" / "tokenpacker-s4" / "vltok_config.json").exists()
    assert "tokenpacker" in printed and "untrained, val" in printed

    Store(tmp_path).path(runs[2].name, settings(runs[2], 4, budget)).unlink()
    trained = []
    monkeypatch.setattr(condense, "train", lambda runs, *rest: trained.extend(runs) or train(runs, *rest))
    main(arguments)
    assert trained == [runs[2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "3"], "of 1, 2, 4"),
        (["--kinds", "pool"], "average, tokenpacker"),
        (["--seeds", "a"], "numbers"),
        (["--parts", "tower"], "projector, lm"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_table_gives_mean_and_range_over_seeds():
    def record(seed, share):
        figures = dict.fromkeys(KINDS, share)
        run = {"kind": "average", "scale": 4, "part": "projector", "seed": seed, "tokens": 16}
        test = {"hits": dict.fromkeys(KINDS, round(10 * share)), "asked": dict.fromkeys(KINDS, 10)}
        run["budget"] = {"steps": 5, "batch_size": 2}
        return {"run": run, "untrained": figures, "val": figures, "test": test}

    text = condense_table.render([record(0, 0.9), record(1, 0.5)]).text()
    assert text.count("70.0 (50.0-90.0)") == 3 * len(KINDS) + 1 and "5 x 2" in text  # once more for all of test
    assert condense_table.spread([0.25]) == "25.0" and condense_table.spread([]) is None


@pytest.mark.parametrize("scale", SCALES)
def test_shipped_adapters_answer_better_than_pooling(scale):
    model, processor = load()
    folder = ADAPTERS / f"tokenpacker-s{scale}"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * 2**20
    canvases = Canvases("val", 3, kinds=kinds_known(processor.tokenizer.get_vocab()))
    batch = BatchStream(canvases, processor.tokenizer, 8, 1, 12)[0]
    with torch.no_grad():
        states = tower_states(model, batch)
        tokens = (16 // scale) ** 2
        with vltok.apply(model, vltok.AveragePool(scale), processor=processor) as handle:
            pooled = handle.added_modules[0](states[-2][:, 1:])
        plain = answer_loss(model, pooled, batch.condensed(tokens))[0]
        with vltok.load(model, folder, processor=processor) as handle:
            features = torch.cat([states[level][:, 1:] for level in levels(model)], dim=-1)
            trained = answer_loss(model, handle.added_modules[0](features), batch.condensed(tokens))[0]
    assert trained < 0.7 * plain
