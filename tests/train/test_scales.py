"""A method with several scale factors is trained at all of them: each batch draws one for processor and model alike."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import LLAVA, LLAVA_NEXT, picture
from train.records import record
from train.runs import losses, make, weights

import vltok
from vltok.processing import TokenPackerHDProcessor
from vltok.train import Collator, Conversations
from vltok.train.collator import IGNORE

TOKENS = {2: 4, 4: 1, 1: 16}  # of a picture of 16 patches


def samples(count: int = 24) -> list[list]:
    """Batches of two conversations about a picture each."""
    rows = [record(f"s{i}", [picture(i)], "<image>w1", f"w{i % 9} w3") for i in range(2 * count)]
    data = Conversations(rows)
    return [[data[2 * i], data[2 * i + 1]] for i in range(count)]


def test_a_batch_says_the_scale_that_its_placeholders_were_written_for():
    model, processor = LLAVA.model(), LLAVA.processor()
    with vltok.apply(model, vltok.TokenPacker((2, 4, 1)), processor=processor) as handle:
        collator = Collator(processor).drawing()
        seen = Counter()
        for pair in samples():
            batch = collator(pair)
            scale = batch.pop("scale_factor")
            assert ((batch["input_ids"] == 4).sum(1) == TOKENS[scale]).all()
            with handle.using(scale_factor=scale):
                assert model(**batch).loss.isfinite()
            seen[scale] += 1
        assert min(seen[scale] for scale in TOKENS) >= 3
        plain = Collator(processor)(samples(1)[0])
        assert "scale_factor" not in plain and (plain["input_ids"] == 4).sum() == 2 * TOKENS[2]


def test_a_draw_hangs_on_samples_and_epoch_alone():
    with vltok.apply(LLAVA.model(), vltok.AveragePool((2, 4)), processor=LLAVA.processor()) as handle:
        first, second = Collator(handle.processor).drawing(), Collator(handle.processor).drawing()
        batches = samples(16)

        def draws(collator: Collator, batches: list) -> list[int]:
            return [collator(batch)["scale_factor"] for batch in batches]

        found = draws(first, batches)
        assert draws(second, batches[::-1])[::-1] == found
        first.epoch = 1
        assert draws(first, batches) != found
        first.epoch = 0
        assert draws(first, batches) == found
        first.epoch = 3
        assert first.drawing().epoch == 3


def test_a_method_of_one_scale_draws_nothing():
    with vltok.apply(LLAVA.model(), vltok.TokenPacker((2,)), processor=LLAVA.processor()) as handle:
        (pair,) = samples(1)
        drawn, plain = (
            collator(pair) for collator in (Collator(handle.processor).drawing(), Collator(handle.processor))
        )
        assert drawn.keys() == plain.keys()
        assert all(torch.equal(drawn[name], plain[name]) for name in plain)


def test_tiles_of_large_pictures_are_drawn_too():
    model, base = LLAVA.model(), LLAVA.processor()
    base.tokenizer.add_tokens([",", "\n"])
    with vltok.apply(model, vltok.TokenPacker((2, 4)), processor=base):
        collator = Collator(TokenPackerHDProcessor(base, max_tiles=9), style="vicuna").drawing()
        seen = set()
        for i in range(8):
            batch = collator([record(f"s{i}", [picture(i, (150, 60))], "<image>w1", "w2")])
            assert (batch["input_ids"] == 4).sum() == TOKENS[batch["scale_factor"]] * len(batch["pixel_values"])
            seen.add(batch["scale_factor"])
        assert seen == {2, 4}


@torch.no_grad()
def loss_at(trainer, scale: int) -> float:
    """Loss per answer token over the data at a scale factor."""
    with trainer.handle.using(scale_factor=scale):
        return trainer.evaluate(trainer.train_dataset)["eval_loss"]


@pytest.mark.parametrize(
    ("family", "method", "scales"),
    [
        (LLAVA, vltok.TokenPacker((2, 4, 1)), (2, 4, 1)),
        (LLAVA, vltok.AveragePool((2, 4)), (2, 4)),
        (LLAVA_NEXT, vltok.TokenPacker((3, 1)), (3, 1)),
    ],
    ids=["tokenpacker", "average_pool", "crops"],
)
def test_training_lowers_the_loss_at_each_scale(tmp_path, folder, family, method, scales):
    trainer = make(tmp_path, folder, family=family, method=method, max_steps=32, save_steps=100)
    before = {scale: loss_at(trainer, scale) for scale in scales}
    trainer.train()
    for scale in scales:
        assert loss_at(trainer, scale) < 0.9 * before[scale]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == loss_at(trainer, scales[0])


def test_a_resumed_run_draws_as_if_it_had_not_stopped(tmp_path, folder):
    settings = {"method": vltok.TokenPacker((2, 4)), "max_steps": 10, "save_steps": 3, "save_total_limit": 5}
    whole = make(tmp_path / "whole", folder, **settings)
    whole.train()
    for step in (3, 6):  # in the first epoch of four steps, and in the second
        again = make(tmp_path / f"again{step}", folder, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert losses(again) == losses(whole)
        assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


def test_processes_that_load_data_draw_alike(tmp_path, folder):
    runs = []
    for workers in (0, 2):
        settings = {"method": vltok.TokenPacker((2, 4)), "dataloader_num_workers": workers, "save_steps": 100}
        trainer = make(tmp_path / str(workers), folder, **settings)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_each_batch_of_a_step_has_its_own_scale(tmp_path, folder):
    """And counts by its answer tokens, of which there are as many at any scale."""
    trainer = make(tmp_path, folder, method=vltok.TokenPacker((2, 4)), per_device_batch=1, grad_accum=8, max_steps=1)
    seen = []
    hook = trainer.handle.added_modules[0].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    trainer.train()
    hook.remove()
    assert len(seen) == 8 and set(seen) == {4, 1}
    collate = Collator(trainer.handle.processor)
    counts = [[(collate([s])["labels"] != IGNORE).sum() for s in trainer.train_dataset]]
    with trainer.handle.using(scale_factor=4):
        counts.append([(collate([s])["labels"] != IGNORE).sum() for s in trainer.train_dataset])
    assert counts[0] == counts[1]
