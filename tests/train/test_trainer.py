"""Training lowers the loss of what is to be trained, counts answer tokens alike however they are batched, and leaves
nothing else changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, picture
from torch.nn import functional as F
from train.records import record
from train.runs import losses, make, weights

import vltok
from vltok.method import Method, register
from vltok.train import Collator, Conversations
from vltok.train.collator import IGNORE
from vltok.train.trainer import answer_sums, check_gathers

STRIDE = vltok.StrideTokens(num_keep=4)


@pytest.mark.parametrize(
    ("family", "method", "parts", "rank"),
    [
        (LLAVA, vltok.TokenPacker(scale_factor=2), "projector", None),
        (LLAVA_NEXT, vltok.TokenPacker(scale_factor=3), "projector+llm", None),
        (LLAVA, vltok.TokenPacker(scale_factor=2), "projector+llm", 4),
        (LLAVA, [vltok.TokenPacker(scale_factor=2), vltok.ToDRE(num_keep=2, relevance=False)], "projector", None),
        (LLAVA_ONEVISION, [vltok.TokenPacker(scale_factor=2), vltok.DivPrune(keep_ratio=0.5)], "projector", None),
        (QWEN2_5_VL, vltok.StrideTokens(num_keep=4), "llm", None),
        (INTERNVL, vltok.ToDRE(num_keep=4, tau=1.0), "projector+llm", None),
        (LLAVA, vltok.FasterVLM(num_keep=4), "tower", None),
    ],
)
def test_training_lowers_the_loss_and_changes_what_trains_and_nothing_else(
    tmp_path, folder, family, method, parts, rank
):
    trainer = make(tmp_path, folder, family=family, method=method, parts=parts, lora=rank, max_steps=24)
    before = weights(trainer)
    trains = {name for name, parameter in trainer.weights.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    curve = losses(trainer)
    assert len(curve) == 24
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= trains
    assert len(changed) > (0.5 if parts == "tower" else 0.8) * len(trains)  # a tower's last layer is not read


def test_gradient_checkpointing_changes_no_loss(tmp_path, folder):
    runs = [
        make(tmp_path / str(on), folder, parts=parts, activation_checkpointing=on, method=STRIDE, lora=rank)
        for parts, rank in (("projector", None), ("llm", 2))
        for on in (True, False)
    ]
    for trainer in runs:
        trainer.train()
    for recomputed, kept in (runs[:2], runs[2:]):
        assert losses(recomputed)[0] != losses(recomputed)[-1]
        assert losses(recomputed) == pytest.approx(losses(kept), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_accumulated_batches_weigh_every_answer_token_alike(tmp_path, folder, batch):
    """Answers differ in length, so a mean of means would differ."""
    whole = make(tmp_path / "whole", folder, per_device_batch=8, max_steps=4)
    parts = make(tmp_path / "parts", folder, per_device_batch=batch, grad_accum=8 // batch, max_steps=4)
    whole.train(), parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    data = Conversations(folder.records, folder.path)
    collate = Collator(LLAVA.processor())
    counts = [(collate([data[index]])["labels"] != IGNORE).sum().item() for index in range(8)]
    assert len(set(counts)) > 1


def test_evaluation_is_per_answer_token_whatever_the_batches(tmp_path, folder):
    found = []
    for batch in (1, 3, 8):
        trainer = make(tmp_path, folder, evaluate=folder.records, per_device_eval_batch_size=batch)
        trainer.eval_dataset.images = folder.path
        found.append(trainer.evaluate())
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(8)])
    with torch.no_grad():
        logits = trainer.handle.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    targets = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1][targets != IGNORE].double(), targets[targets != IGNORE])
    right = (logits[:, :-1].argmax(-1) == targets)[targets != IGNORE].double().mean()
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["eval_answer_accuracy"] == pytest.approx(right.item())


def test_answer_sums_are_those_of_each_sample_alone():
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(0, 7, (3, 5))
    labels[0, 1:3] = labels[1, :] = IGNORE
    sums = answer_sums(logits, labels)
    for row in range(3):
        places = [place for place in range(1, 5) if labels[row, place] != IGNORE]
        expected = [0.0, 0.0, float(len(places))]
        for place in places:
            expected[0] -= logits[row, place - 1].log_softmax(-1)[labels[row, place]].item()
            expected[1] += float(logits[row, place - 1].argmax() == labels[row, place])
        torch.testing.assert_close(sums[row], torch.tensor(expected))


def test_evaluation_runs_during_training_and_the_best_checkpoint_comes_back(tmp_path, folder):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    data = Conversations(folder.records, folder.path)
    trainer = make(tmp_path, folder, evaluate=data, learning_rate=3.0, save_total_limit=5, **settings)
    trainer.train()
    metrics = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert list(metrics) == [2, 4, 6]
    best = min(metrics, key=metrics.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics[best], rel=1e-6)


@register("test-penalty")
@dataclass(frozen=True)
class Penalty(Method):
    """Leaves a loss term."""

    def attach(self, view: Any, edits: Any, run: Any) -> None:
        edits.after(view.host.multi_modal_projector, lambda module, args, kwargs, output: run.loss("p", output.sum()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_term_of_a_method_is_added_as_a_mean_over_forward_passes(tmp_path, folder, accumulate):
    settings = {"grad_accum": accumulate, "learning_rate": 0.0, "per_device_batch": 4 // accumulate}
    settings |= {"train_sampling_strategy": "sequential", "max_steps": 2, "collator": {"style": "vicuna"}}
    plain = make(tmp_path / "plain", folder, **settings)
    with_term = make(tmp_path / "term", folder, method=[vltok.TokenPacker(scale_factor=2), Penalty()], **settings)
    terms = []
    with_term.handle.host.multi_modal_projector.register_forward_hook(lambda m, a, out: terms.append(out.sum().item()))
    plain.train(), with_term.train()
    for step in range(2):
        added = terms[step * accumulate : (step + 1) * accumulate]
        assert abs(sum(added)) > 1e-3
        assert losses(with_term)[step] - losses(plain)[step] == pytest.approx(sum(added) / accumulate, rel=1e-3)


@pytest.mark.parametrize(("parts", "method"), [("llm", STRIDE), ("projector+llm", vltok.ToDRE(num_keep=4, tau=1.0))])
def test_batches_without_pictures_train_the_language_model(tmp_path, parts, method):
    rows = [record(f"s{i}", [], f"w{i}", f"w{i + 1}") for i in range(4)]
    trainer = make(tmp_path, rows, parts=parts, method=method)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_batches_without_pictures_leave_the_projector_as_it_is(tmp_path):
    trainer = make(tmp_path, [record(f"s{i}", [], f"w{i}", f"w{i + 1}") for i in range(4)])
    before = weights(trainer)
    trainer.train()
    assert losses(trainer)[0] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


def test_a_step_whose_samples_were_all_dropped_changes_nothing(tmp_path, caplog):
    rows = [record("bad", [str(tmp_path / "missing.png")], "<image>w1", "w2")] * 2
    trainer = make(
        tmp_path, rows, parts="projector+llm", collator={"on_bad_image": "drop"}, logging_nan_inf_filter=False
    )
    before = weights(trainer)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert losses(trainer) == [0] * 6
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert "samples dropped (bad image): 12" in caplog.text


def test_rows_of_a_datasets_table_are_trained_on(tmp_path, folder):
    import datasets

    table = datasets.Dataset.from_list(
        [
            {
                "images": [picture(i)],
                "messages": [{"role": "user", "content": "<image>w1"}, {"role": "assistant", "content": f"w{i}"}],
            }
            for i in range(4)
        ]
    )
    trainer = make(tmp_path, table)
    trainer.train()
    assert len(losses(trainer)) == 6


@pytest.mark.parametrize("parts", ["projector", "projector+llm"])
def test_configs_come_out_of_training_as_they_went_in(tmp_path, folder, parts):
    untrained = vltok.apply(LLAVA.model(), vltok.TokenPacker(scale_factor=2), processor=LLAVA.processor()).model
    for_saving = {"architectures": [type(untrained).__name__], "dtype": torch.float32}  # what save_pretrained notes
    untrained.config.update(for_saving)
    before = untrained.config.to_dict(), untrained.generation_config.to_dict()
    attributes = set(vars(untrained.config))
    trainer = make(tmp_path, folder, parts=parts)
    model = trainer.handle.model
    model.config.update(for_saving)
    trainer.train()
    trainer.evaluate(Conversations(folder.records, folder.path))
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert set(vars(model.config)) == attributes
    trainer.handle.remove()
    fresh = LLAVA.model()
    assert model.state_dict().keys() == fresh.state_dict().keys()
    if parts == "projector":
        assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_unused_parameters_are_looked_for_only_where_the_tower_trains(tmp_path, folder):
    for parts, needed in (("projector+llm", False), ("llm", False), ("tower", True)):
        assert make(tmp_path, folder, parts=parts).args.ddp_find_unused_parameters is needed
    assert make(tmp_path, folder, ddp_find_unused_parameters=True).args.ddp_find_unused_parameters is True


def test_what_cannot_be_trained_is_refused(tmp_path, folder, monkeypatch):
    trainer = make(tmp_path, folder)
    handle, args, collator = trainer.handle, trainer.args, trainer.data_collator

    def again(handle):
        return type(trainer)(handle, args, collator, folder.records)

    monkeypatch.setattr(args, "_n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        again(handle)
    monkeypatch.undo()
    handle.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter trains"):
        again(handle)
    handle.remove()
    with pytest.raises(ValueError, match="was removed"):
        again(handle)


def test_fsdp_that_would_save_shards_is_refused():
    from torch.distributed.fsdp import StateDictType

    plugin = SimpleNamespace(state_dict_type=StateDictType.FULL_STATE_DICT)
    check_gathers(plugin)
    plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
    with pytest.raises(ValueError, match=r"FULL_STATE_DICT.*got SHARDED"):
        check_gathers(plugin)
