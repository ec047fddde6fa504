"""The recipes are the published ones, and keep their global batch on any number of processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vltok.train import FINETUNE, PRETRAIN
from vltok.train.recipe import CHECKPOINTING


def test_the_recipes_are_the_published_ones(tmp_path):
    first, second = PRETRAIN.arguments(tmp_path), FINETUNE.arguments(tmp_path)
    assert (PRETRAIN.train, FINETUNE.train) == ("projector", "projector+llm")
    assert (first.learning_rate, second.learning_rate) == (1e-3, 2e-5)
    assert (PRETRAIN.global_batch, FINETUNE.global_batch) == (256, 128) == (8 * 32, 8 * 16)
    assert (PRETRAIN.style, PRETRAIN.pad_to_square) == ("plain", False)
    assert (FINETUNE.style, FINETUNE.pad_to_square) == ("auto", True)
    for recipe, args in ((PRETRAIN, first), (FINETUNE, second)):
        assert args.lr_scheduler_type == "cosine"
        assert args.get_warmup_steps(1000) == 30
        assert (args.weight_decay, args.num_train_epochs, recipe.max_length) == (0, 1, 2048)
        assert getattr(args, CHECKPOINTING)
        assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
        assert args.report_to == []


@pytest.mark.parametrize(("processes", "batch", "steps"), [("1", None, 8), ("8", None, 1), ("2", 4, 32), ("1", 256, 1)])
def test_batches_are_accumulated_to_the_global_batch(tmp_path, monkeypatch, processes, batch, steps):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("vltok.train.recipe.TrainingArguments", dict)  # the real ones would wait for other processes
    assert PRETRAIN.arguments(tmp_path, per_device_batch=batch)["gradient_accumulation_steps"] == steps


def test_a_batch_that_does_not_divide_the_global_one_is_refused_unless_accumulation_is_given(tmp_path):
    with pytest.raises(ValueError, match="24 samples per device on 1 processes don't make up the global batch of 256"):
        PRETRAIN.arguments(tmp_path, per_device_batch=24)
    args = PRETRAIN.arguments(tmp_path, per_device_batch=24, grad_accum=2)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (24, 2)


def test_fields_of_the_recipe_and_of_the_arguments_can_be_overridden(tmp_path):
    args = replace(PRETRAIN, learning_rate=5e-4).arguments(tmp_path, max_steps=7, seed=3)
    assert (args.learning_rate, args.max_steps, args.seed) == (5e-4, 7, 3)
    assert PRETRAIN.arguments(tmp_path, learning_rate=1e-2).learning_rate == 1e-2


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_has_the_name_of_any_version(tmp_path, name):
    options = {"use_reentrant": True}
    args = PRETRAIN.arguments(tmp_path, **{name: False, f"{name}_kwargs": options})
    assert getattr(args, CHECKPOINTING) is False
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == options
