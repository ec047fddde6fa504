"""The command line of the fine-tuning add-on: `python -m vltok.train`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available

from vltok.api import Handle, apply
from vltok.engine.guard import CONFIG_FIELD
from vltok.errors import VltokError
from vltok.files import find_model
from vltok.method import Method
from vltok.processing import TokenPackerHDProcessor
from vltok.serialization import CONFIG_FILE, from_pretrained, load
from vltok.train.collator import Collator
from vltok.train.data import Conversations
from vltok.train.recipe import CHECKPOINTING, RECIPES
from vltok.train.trainable import add_lora, set_trainable
from vltok.train.trainer import VltokTrainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RecipeName(StrEnum):
    """The published recipes."""

    pretrain = "pretrain"
    finetune = "finetune"


class StyleName(StrEnum):
    """Styles of prompts."""

    auto = "auto"
    chat = "chat"
    vicuna = "vicuna"
    plain = "plain"
    suffix = "suffix"


class FaultName(StrEnum):
    """What to do about a faulty sample."""

    stop = "raise"
    drop = "drop"


class DtypeName(StrEnum):
    """What to compute in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group)


LORA_RANK = 128
MODEL, DATA, TRAIN, RUN = "Model", "Data", "Training (defaults come from the recipe)", "Run"


@app.command()
def main(
    *,
    model: Annotated[str, _option(MODEL, "Folder of the model, or its name on the hub.")],
    data: Annotated[Path, _option(DATA, "LLaVA JSON or .jsonl, .parquet, or a folder of datasets' save_to_disk.")],
    method: Annotated[
        list[str] | None,
        _option(
            MODEL,
            'A method: "tokenpacker,scale_factor=2,init=pool", its JSON, or a folder written by vltok.save to go on '
            "from. Repeat it for several methods.",
        ),
    ] = None,
    dtype: Annotated[
        DtypeName, _option(MODEL, "Frozen weights and arithmetic; what trains is float32. auto: bfloat16 on GPUs.")
    ] = DtypeName.auto,
    download: Annotated[bool, _option(MODEL, "Fetch the model if it is not on this machine.", "--download")] = False,
    images: Annotated[Path | None, _option(DATA, "Folder of images and videos; by default the data file's.")] = None,
    eval_data: Annotated[Path | None, _option(DATA, "The same for evaluation.")] = None,
    hd: Annotated[
        int | None, _option(DATA, "TokenPacker-HD: cut large images into at most so many tiles (9, 16 or 25).")
    ] = None,
    style: Annotated[StyleName | None, _option(DATA, "How prompts look.")] = None,
    max_length: Annotated[int | None, _option(DATA, "Most tokens of a sample, with its visual tokens.")] = None,
    pad_to_square: Annotated[
        bool | None, _option(DATA, "Pad images to a square first; finetune does where they would be cropped to one.")
    ] = None,
    on_bad_image: Annotated[FaultName, _option(DATA, "For images and videos that can't be opened.")] = FaultName.stop,
    on_too_long: Annotated[FaultName, _option(DATA, "For samples without answer in max-length.")] = FaultName.stop,
    num_workers: Annotated[int | None, _option(DATA, "Processes that load data.")] = None,
    recipe: Annotated[
        RecipeName, _option(TRAIN, "Published settings: pretrain trains the projector, finetune also the LLM.")
    ] = RecipeName.pretrain,
    train: Annotated[
        str | None,
        _option(TRAIN, 'Parts that train: projector, tower, llm or lora (the LLM by LoRA), joined by "+"; or full.'),
    ] = None,
    lora_r: Annotated[int | None, _option(TRAIN, "Rank of the LoRA; 128 by default.")] = None,
    lora_alpha: Annotated[float | None, _option(TRAIN, "LoRA scale times rank; twice the rank by default.")] = None,
    lora_targets: Annotated[str | None, _option(TRAIN, "Layers: q_proj,v_proj; all of the decoder by default.")] = None,
    lr: Annotated[float | None, _option(TRAIN, "Peak learning rate.")] = None,
    epochs: Annotated[float | None, _option(TRAIN, "Passes over the data.")] = None,
    max_steps: Annotated[int | None, _option(TRAIN, "Steps, instead of epochs.")] = None,
    per_device_batch: Annotated[int | None, _option(TRAIN, "Samples per device and forward pass.")] = None,
    grad_accum: Annotated[
        int | None, _option(TRAIN, "Batches per step; by default as many as make the recipe's global batch.")
    ] = None,
    checkpointing: Annotated[bool, _option(TRAIN, "Recompute activations to save memory.")] = True,
    out: Annotated[Path, _option(RUN, "Where adapter, model, checkpoints and log_history.json go.")],
    seed: Annotated[int, _option(RUN, "Seed of the order of samples, and of weights that start random.")] = 42,
    resume: Annotated[bool, _option(RUN, "Go on from the last checkpoint in OUT.", "--resume")] = False,
    save_steps: Annotated[int, _option(RUN, "Steps between checkpoints; the last two are kept.")] = 500,
    eval_steps: Annotated[int | None, _option(RUN, "Steps between evaluations; by default as for checkpoints.")] = None,
) -> None:
    """Fine-tune a vision-language model with vltok methods on it.

    On several GPUs: accelerate launch --multi_gpu --num_processes N -m vltok.train ...
    Nothing is downloaded unless --download asks for it.
    """
    plan = RECIPES[recipe]
    low = _pick_dtype(dtype)
    given = {"learning_rate": lr, "num_train_epochs": epochs, "max_steps": max_steps, "bf16": low == torch.bfloat16}
    given |= {"dataloader_num_workers": num_workers, CHECKPOINTING: checkpointing}
    given |= {"seed": seed, "save_steps": save_steps}
    if eval_data is not None:
        given |= {"eval_strategy": "steps", "eval_steps": eval_steps or save_steps}
    try:
        args = plan.arguments(
            out,
            per_device_batch=per_device_batch,
            grad_accum=grad_accum,
            **{name: value for name, value in given.items() if value is not None},
        )
        if resume and (not out.is_dir() or get_last_checkpoint(str(out)) is None):
            raise FileNotFoundError(f"there is no checkpoint in {out} to resume; leave out --resume to start")
        set_seed(seed)
        handle = load_handle(model, method or [], low, download)
        names = (train or plan.train).split("+")
        if "lora" not in names and (lora_r, lora_alpha, lora_targets) != (None, None, None):
            raise ValueError(f'LoRA settings are for --train lora or "projector+lora", got --train {"+".join(names)}')
        counts = set_trainable(handle, "+".join("llm" if name == "lora" else name for name in names))
        trained = handle.model
        if "lora" in names:
            targets = lora_targets.split(",") if lora_targets else None
            trained = add_lora(handle, lora_r or LORA_RANK, alpha=lora_alpha, targets=targets)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        processor = handle.processor if hd is None else TokenPackerHDProcessor(handle.processor, max_tiles=hd)
        collator = Collator(
            processor,
            style=style or plan.style,
            max_length=max_length or plan.max_length,
            on_bad_image=on_bad_image,
            on_too_long=on_too_long,
            pad_to_square=plan.pad_to_square and crops(processor) if pad_to_square is None else pad_to_square,
        )
        samples = Conversations.from_file(data, images)
        held_out = None if eval_data is None else Conversations.from_file(eval_data, images)
        trainer = VltokTrainer(handle, args, collator, samples, held_out, model=trained)
    except (VltokError, ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if trainer.is_world_process_zero():
        size = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        typer.echo(
            f"{handle}\nstyle {collator.write.style}, answers by {collator.write.answers_by}\n"
            f"{size:,} parameters train ({', '.join(part for part, count in counts.items() if count)}), on "
            f"{len(samples):,} samples, {args.per_device_train_batch_size} x {args.world_size} x "
            f"{args.gradient_accumulation_steps} of them per step"
        )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out))
    if hd is not None and trainer.is_world_process_zero():
        processor.save_pretrained(out / "processor")
    trainer.accelerator.end_training()


def crops(processor: Any) -> bool:
    """Whether a processor cuts off the sides of an image that is no square, so that it had better be padded to one."""
    makes_tiles = isinstance(processor, TokenPackerHDProcessor) or hasattr(
        processor.image_processor, "image_grid_pinpoints"
    )
    return bool(getattr(processor.image_processor, "do_center_crop", False)) and not makes_tiles


def load_handle(model: str, methods: list[str], dtype: torch.dtype, download: bool = False) -> Handle:
    """Load a model and its processor, and put methods on it.

    Args:
        model: Folder, or name on the hub; it may have been saved with methods on it.
        methods: As for `Method.from_text`, or a folder written by `vltok.save`; none if the model was saved with them.
        dtype: Dtype of the weights.
        download: Whether files may be fetched.

    Raises:
        OSError: If the model is not here.
        ValueError: If there is no method, or one too many.
    """
    local = not download
    try:
        place = find_model(model, download)
        config = AutoConfig.from_pretrained(place, local_files_only=local)
        if hasattr(config, CONFIG_FIELD):
            if methods:
                raise ValueError(f"{model} was saved with methods on it; leave out --method to go on with them")
            return from_pretrained(place, dtype=dtype)
        loaded = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, local_files_only=local)
        processor = AutoProcessor.from_pretrained(place, local_files_only=local)
    except OSError as error:
        raise OSError(
            f"{model} is not here: give the folder of a model, or fetch it from the hub with --download\n({error})"
        ) from error
    if not methods:
        raise ValueError('give a method: --method "tokenpacker,scale_factor=2", or a folder written by vltok.save')
    saved = [text for text in methods if (Path(text) / CONFIG_FILE).is_file()]
    if saved and len(methods) > 1:
        raise ValueError(f"{saved[0]} holds all methods of a model; give no other --method beside it")
    if saved:
        return load(loaded, saved[0], processor=processor)
    return apply(loaded, [Method.from_text(text) for text in methods], processor=processor)


def _pick_dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.accelerator.is_available() and is_torch_bf16_gpu_available() else torch.float32
    return getattr(torch, name)
