"""VltokTrainer: the Hugging Face Trainer for a model with methods on it.

Distribution (DDP, FSDP, DeepSpeed), accumulation, schedules and progress are the Trainer's and accelerate's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from vltok.api import Handle
from vltok.train.checkpoint import TrainedWeights
from vltok.train.collator import IGNORE, SCALE, Collator
from vltok.train.data import Conversations
from vltok.train.method_loss import method_loss
from vltok.train.trainable import parts_of

logger = logging.get_logger(__name__)
LOG_FILE = "log_history.json"
_ABSENT = object()


def answer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss and accuracy over all answer tokens, from each sample's (summed loss, tokens right, tokens)."""
    loss, right, tokens = prediction.predictions.astype("float64").sum(0)
    return {"loss": loss / max(tokens, 1), "answer_accuracy": right / max(tokens, 1)}


class VltokTrainer(Trainer):
    """Trains a model with methods on it. The loss is a mean over all answer tokens of a step, plus `handle.loss()`.

    Each checkpoint holds what `TrainedWeights` writes: the methods alone if nothing but what they added trains, and the
    optimizer's state. `train(resume_from_checkpoint=...)` goes on exactly. Evaluation gives the loss per answer token
    and the share of answer tokens that come out right, the same on any number of processes. `save_model(folder)`
    writes the result and log_history.json.

    A method with several scale factors is trained at all of them: each batch of each process draws one, see
    `Collator.drawing`. Evaluation is at the first; at another one inside `with handle.using(scale_factor=...)`, with
    `dataloader_num_workers=0`.

    Args:
        handle: The methods on the model; `set_trainable` says what trains.
        args: From `Recipe.arguments`, or made by hand.
        collator: Makes the batches.
        train_dataset: Samples; a list of records or a `datasets.Dataset` will do.
        eval_dataset: Samples to evaluate on.
        model: The model, if `add_lora` wrapped the handle's.
        options: For the Trainer, such as callbacks.

    Raises:
        ValueError: If the handle was removed, nothing trains, one process would run on several GPUs, or FSDP would save
            shards.
    """

    def __init__(
        self,
        handle: Handle,
        args: TrainingArguments,
        collator: Collator,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        model = handle.model if model is None else model
        if not handle.is_attached:
            raise ValueError("this handle was removed from its model; train before remove()")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError('no parameter trains; call set_trainable(handle, "projector") or another preset first')
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs, and methods can't run in several threads at a time; start one "
                'process per GPU ("accelerate launch -m vltok.train ..."), or set CUDA_VISIBLE_DEVICES to one GPU'
            )
        train_dataset, eval_dataset = _samples(train_dataset), _samples(eval_dataset)
        args.remove_unused_columns, args.label_names = False, ["labels"]
        if args.ddp_find_unused_parameters is None:
            tower = parts_of(handle)["tower"]  # has layers behind the one that is read
            args.ddp_find_unused_parameters = any(parameter.requires_grad for parameter in tower)
        self.handle = handle
        self.weights = TrainedWeights(handle, model)
        config = handle.model.config
        use_cache = vars(config).get("use_cache", _ABSENT)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=answer_metrics,
            **options,
        )
        self.add_callback(_TellEpoch(collator))
        # Many models would average over each batch by itself, so the loss is ours: of a whole step, told its tokens.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            check_gathers(self.accelerator.state.fsdp_plugin)
        # The Trainer turns the cache off in the config, which is saved with the model: here it is off call by call.
        if use_cache is _ABSENT:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = use_cache

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        for reason, count in self.data_collator.dropped.items():
            total = self.accelerator.reduce(torch.tensor(count, device=self.args.device)).item()
            if total and self.is_world_process_zero():
                logger.warning("samples dropped (%s): %d", reason, total)
        return result

    def get_train_dataloader(self) -> DataLoader:
        plain = self.data_collator
        self.data_collator = plain.drawing()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        # Where every sample of a step was dropped the loss is 0 / 1, not 0 / 0.
        return batches, tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        with self._at_scale_of(inputs) as inputs:
            outputs = model(**inputs, use_cache=False)  # with labels, which tell methods where answers begin
        sums = answer_sums(outputs.logits, inputs["labels"])
        loss = sums[:, 0].sum() / (sums[:, 2].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients of all processes are averaged
        loss = loss + method_loss(self, self.handle, num_items_in_batch).to(loss)
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _at_scale_of(self, inputs: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """What the model is called with, in a block in which the scale factor that the batch was made for counts."""
        tensors = {name: value for name, value in inputs.items() if name != SCALE}
        with self.handle.using(**({SCALE: inputs[SCALE]} if SCALE in inputs else {})):
            yield tensors

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        sums = answer_sums(logits, labels)
        return None, sums, sums[:, 2]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self.weights.save(output_dir or self.args.output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            text = json.dumps(self.state.log_history, indent=2) + "\n"
            Path(output_dir or self.args.output_dir, LOG_FILE).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.weights.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.weights.load(self.state.best_model_checkpoint)


class _TellEpoch(TrainerCallback):
    """Tells the collator the number of the epoch that begins."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


def answer_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum up each sample's answer tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 where nothing is to be learned.

    Returns:
        Summed loss, tokens predicted right, and tokens, (B, 3), float32.
    """
    targets = labels[:, 1:]
    sample, place = (targets != IGNORE).nonzero(as_tuple=True)
    chosen, targets = logits[sample, place].float(), targets[sample, place]
    loss = F.cross_entropy(chosen, targets, reduction="none")
    values = torch.stack([loss, (chosen.argmax(-1) == targets).float(), torch.ones_like(loss)], dim=1)
    return values.new_zeros(len(labels), 3).index_add_(0, sample, values)


def check_gathers(plugin: Any) -> None:
    """Raise ValueError unless FSDP gathers whole weights to save: shards can't be written in vltok's format."""
    kind = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    if kind != "FULL_STATE_DICT":
        raise ValueError(
            f"set FSDP's state dict type to FULL_STATE_DICT, or nothing could be saved at the end; got {kind}"
        )


def _samples(data: Any) -> Any:
    return data if data is None or isinstance(data, Conversations) else Conversations(data)
