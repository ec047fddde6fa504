"""A method's loss counts in training as if it were the model's own, whatever makes up a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAVA
from torch import nn
from torch.nn import functional as F
from towers import TOWERS, pixels, shared_tower
from train.runs import losses, make
from transformers import Trainer, TrainingArguments

import vltok
from vltok.train import add_method_loss

ADL = vltok.ADL(weight=30.0, threshold=1.2)  # heavy, so that it shows
PICTURES, LABELS = pixels(8), torch.tensor([0, 1] * 4)


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": PICTURES[row], "labels": LABELS[row]}


def classifier() -> nn.Module:
    return copy.deepcopy(shared_tower(TOWERS["vit-classifier"]))


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(
        folder,
        max_steps=1,
        learning_rate=0.05,
        max_grad_norm=0,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, args, train_dataset=Samples())


def step_by_hand(model: nn.Module) -> nn.Module:
    """What one step of the trainer over all samples must do."""
    model.train()
    with vltok.apply(model, ADL) as handle:
        loss = F.cross_entropy(model(PICTURES).logits, LABELS) + handle.loss()
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return model


@pytest.mark.parametrize(("batch", "passes"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_is_that_of_both_losses_however_many_passes_make_it(tmp_path, batch, passes):
    model = classifier()
    expected = step_by_hand(classifier())
    with vltok.apply(model, ADL) as handle:
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": passes}
        add_method_loss(trainer(model, tmp_path, **options), handle).train()
    start = classifier().state_dict()
    for name, parameter in expected.named_parameters():
        # what a batch's queries attend to on average differs little between batches, but it does
        moved = (parameter - start[name]).abs().max().item()
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-3 * moved + 1e-7, msg=name)
    without = classifier()
    trainer(without, tmp_path, per_device_train_batch_size=8).train()
    assert not torch.allclose(
        without.vit.layers[0].attention.q_proj.weight, expected.vit.layers[0].attention.q_proj.weight
    )


def test_evaluation_is_that_of_the_model_alone(tmp_path):
    model = classifier()
    with vltok.apply(model, ADL) as handle:
        it = add_method_loss(trainer(model, tmp_path, per_device_train_batch_size=8), handle)
        it.train()
        found = it.evaluate(Samples())["eval_loss"]
    model.eval()
    assert found == pytest.approx(F.cross_entropy(model(PICTURES).logits, LABELS).item(), rel=1e-4)


def test_a_removed_handle_is_refused(tmp_path):
    model = classifier()
    handle = vltok.apply(model, ADL)
    handle.remove()
    with pytest.raises(ValueError, match="was removed"):
        add_method_loss(trainer(model, tmp_path), handle)


def test_a_vision_language_model_is_fine_tuned_with_it(tmp_path, folder):
    runs = []
    for methods in ([vltok.StrideTokens(num_keep=4)], [vltok.StrideTokens(num_keep=4), ADL]):
        run = make(tmp_path / str(len(methods)), folder, family=LLAVA, method=methods, parts="tower", max_steps=3)
        run.train()
        runs.append(losses(run))
        if len(methods) == 2:
            assert len(run.handle.report(file=None).diversification.losses) > 0
    assert runs[1][0] > runs[0][0] + 1
