"""Train projectors that condense visual tokens, on the shipped canvas model: `python -m eval.canvas.condense`.

TokenPacker, pixel shuffle, average pooling and the plain projector start from the model's own projector and get the
same pictures in the same order, the same optimizers and rates. Part "projector" trains the projector alone; part "lm"
also the language model. The tower is frozen in both. A run whose results are in the folder is not trained again. A
projector for several scale factors sees each batch at one of them and is tested at each.
"""

import json
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

import vltok
from eval.canvas import condense_table
from eval.canvas.attention import use_block_attention
from eval.canvas.batches import Batch, BatchStream
from eval.canvas.data import KINDS, Canvases
from eval.canvas.losses import answer_loss
from eval.canvas.model import load
from eval.canvas.muon import Muon
from eval.canvas.runner import Case, Result, draw_questions, encode, evaluate
from eval.canvas.train import BLOCKS, Phase, rate_factor
from eval.canvas.variants import METHODS, Variant, levels, tokens_at

PARTS = ("projector", "lm")
VAL_BATCHES = 16  # of 8 canvases
FIRST_SEED = 100  # of training canvases; those below were seen when the model was trained


@dataclass(frozen=True)
class Run:
    """One projector to train: `part` says what else learns, `seed` draws canvases and the start's random parts."""

    variant: Variant
    part: str
    seed: int

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.part}-{self.variant.name}-seed{self.seed}"


class Learner:
    """A run in training: its projector, its language model, their optimizers."""

    def __init__(self, run: Run, base: LlavaForConditionalGeneration, budget: Phase) -> None:
        self.run, self.budget = run, budget
        torch.manual_seed(run.seed)
        host, processor = load()
        self.projector = run.variant.put_on(host, processor).train()
        (self.handle,) = vltok.handles(host)
        self.levels = levels(host)
        self.model = base
        trained = [self.projector]
        if run.part == "lm":
            self.model = deepcopy(base)
            trained.append(self.model.model.language_model.requires_grad_(True))
        self.trained = nn.ModuleList(trained)
        self.seconds = 0.0
        matrices, others = [], []
        for name, parameter in self.trained.named_parameters():
            # in_proj holds three matrices, whose changes have to be independent of each other's sizes.
            is_matrix = parameter.ndim == 2 and "embed" not in name and "in_proj" not in name
            (matrices if is_matrix else others).append(parameter)
        self.optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]
        self.rates = [budget.adam_rate]
        if budget.muon_rate:
            self.optimizers.append(Muon(matrices))
            self.rates.append(budget.muon_rate)
        else:
            self.optimizers[0].add_param_group({"params": matrices})

    def answers(self, states: Sequence[torch.Tensor], batch: Batch, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers' loss and the hits per kind at a scale; `states` are the tower's hidden states, CLS first."""
        features = torch.cat([states[level][:, 1:] for level in self.levels], dim=-1)
        with at_scale(self.handle, scale):
            projected = self.projector(features)
        return answer_loss(self.model, projected, batch.condensed(tokens_at(scale)))

    def step(self, number: int, states: Sequence[torch.Tensor], batch: Batch) -> float:
        """Learn from one batch; returns the loss. Of several scales the number of the step draws one."""
        started = time.perf_counter()
        factor = rate_factor(number, self.budget)
        loss = self.answers(states, batch, random.Random(number).choice(self.run.variant.scales))[0]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of {self.run.name} became {loss.item()} at step {number}")
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.seconds += time.perf_counter() - started
        return loss.item()

    @torch.no_grad()
    def validate(self, seen: Sequence[tuple[Sequence[torch.Tensor], Batch]]) -> dict[int, dict[str, float]]:
        """Loss and accuracies at each scale on validation batches, given with the tower's hidden states."""
        return {scale: self._validate(seen, scale) for scale in self.run.variant.scales}

    def _validate(self, seen: Sequence[tuple[Sequence[torch.Tensor], Batch]], scale: int) -> dict[str, float]:
        losses, hits = [], torch.zeros(2, len(KINDS))
        for states, batch in seen:
            loss, part = self.answers(states, batch, scale)
            losses.append(loss.item())
            hits += part
        figures = {kind: (hits[0, k] / hits[1, k]).item() for k, kind in enumerate(KINDS)}
        return {"loss": sum(losses) / len(losses), **figures}


def at_scale(handle: vltok.Handle, scale: int) -> AbstractContextManager[None]:
    """A block in which a handle's method has this scale factor, which is nothing to change where it has one only."""
    (method,) = handle.methods
    return handle.using(**({"scale_factor": scale} if method.per_call() else {}))


@torch.no_grad()
def tower_states(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, ...]:
    """All hidden states of the frozen tower, each (B, 1 + N, C)."""
    return model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states


def train(runs: Sequence[Run], budget: Phase, out: Path) -> None:
    """Train runs of one seed side by side: each batch is drawn, and the tower looks at it, once for all of them.

    Writes the trained weights and what validation said of each run to `out`, and the log's lines as they come.
    """
    base, processor = load()
    base.requires_grad_(False)
    use_block_attention(base.model.language_model)
    (seed,) = {run.seed for run in runs}
    learners = [Learner(run, base, budget) for run in runs]
    validation = BatchStream(Canvases("val", 0), processor.tokenizer, 8, VAL_BATCHES, BLOCKS)
    seen = [(tower_states(base, batch), batch) for batch in (validation[number] for number in range(len(validation)))]
    log = (out / "log.jsonl").open("a", buffering=1)

    def note(learner: Learner, step: int, **record: object) -> None:
        log.write(json.dumps({"run": learner.run.name, "step": step, "seconds": learner.seconds, **record}) + "\n")

    before = {learner.run: learner.validate(seen) for learner in learners}
    for learner in learners:
        note(learner, 0, val=before[learner.run])
    stream = BatchStream(
        Canvases("train", FIRST_SEED + seed), processor.tokenizer, budget.batch_size, budget.steps, BLOCKS
    )
    recent: dict[Run, list[float]] = {run: [] for run in runs}
    batches = DataLoader(stream, batch_size=None, shuffle=False)
    for number, batch in enumerate(tqdm(batches, desc=f"{runs[0].part}, seed {seed}", mininterval=5)):
        states = tower_states(base, batch)
        for learner in learners:
            recent[learner.run].append(learner.step(number, states, batch))
            if (number + 1) % 20 == 0:
                note(learner, number + 1, loss=sum(recent[learner.run]) / len(recent[learner.run]))
                recent[learner.run].clear()
            if (number + 1) % 200 == 0 and number + 1 < budget.steps:
                note(learner, number + 1, val=learner.validate(seen))
    for learner in learners:
        figures = learner.validate(seen)
        note(learner, budget.steps, val=figures)
        save_file(learner.trained.state_dict(), out / f"{learner.run.name}.safetensors")
        variant = learner.run.variant
        kind = variant.kind if len(variant.scales) == 1 else variant.name
        for scale in variant.scales:
            record = {
                "run": {"kind": kind, "scale": scale, "part": learner.run.part}
                | {"seed": seed, "tokens": tokens_at(scale)},
                "budget": asdict(budget),
                "seconds": learner.seconds,
                "parameters": sum(p.numel() for p in learner.trained.parameters()),
                "untrained": before[learner.run][scale],
                "val": figures[scale],
            }
            write_result(out, learner.run, scale, record)
    log.close()


def test(run: Run, scale: int, out: Path, questions: int, seed: int = 0) -> Result:
    """Answer test questions with a trained run at a scale, through the processor and `model.generate`."""
    model, processor = load()
    trained = nn.ModuleList([run.variant.put_on(model, processor)])
    if run.part == "lm":
        trained.append(model.model.language_model)
    trained.load_state_dict(load_file(out / f"{run.name}.safetensors"))
    (handle,) = vltok.handles(model)
    with at_scale(handle, scale):
        canvases = Canvases("test", seed)
        asked = draw_questions(canvases, questions)
        batches = encode(processor, canvases, asked, 8, wrong_image=False)
        return evaluate(model.eval(), processor, Case(run.name, 1 / scale**2), batches, asked)


def write_result(out: Path, run: Run, scale: int, record: dict[str, object]) -> None:
    """Write a run's result at a scale; a crash while writing leaves none."""
    path = _result_file(out, run, scale)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.rename(path)


def read_result(out: Path, run: Run, scale: int) -> dict[str, object] | None:
    """A run's result at a scale, or None where it has not been trained."""
    path = _result_file(out, run, scale)
    return json.loads(path.read_text()) if path.exists() else None


def _result_file(out: Path, run: Run, scale: int) -> Path:
    return out / f"{run.name}{f'-at{scale}' if len(run.variant.scales) > 1 else ''}.json"


def ship(run: Run, out: Path, folder: Path) -> Path:
    """Write the trained projector of a run as an adapter in bfloat16, a folder for vltok.load."""
    model, processor = load()
    handle = vltok.apply(model, run.variant.method(), processor=processor)
    (projector,) = handle.added_modules
    nn.ModuleList([projector]).load_state_dict(load_file(out / f"{run.name}.safetensors"))
    projector.to(torch.bfloat16)
    folder = folder / run.variant.name
    vltok.save(handle, folder)
    return folder


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs: results, weights, log.jsonl.")] = Path(
        "canvas-run/condense"
    ),
    kinds: Annotated[str, typer.Option(help=f"Projectors, with commas: {', '.join(METHODS)}.")] = "average,tokenpacker",
    scales: Annotated[
        str,
        typer.Option(
            help="Sides of a region of patches, with commas; 1 is the plain projector, 2+4 one projector for both."
        ),
    ] = "1,2,4",
    seeds: Annotated[str, typer.Option(help="Of part projector, with commas; part lm takes the first.")] = "0,1,2",
    parts: Annotated[
        str, typer.Option(help="What learns, with commas: projector (alone), lm (with it).")
    ] = "projector,lm",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Canvases of a step.")] = 8,
    muon_rate: Annotated[float, typer.Option(help="Peak rate of Muon for matrices; 0 leaves them to AdamW.")] = 0.005,
    adam_rate: Annotated[float, typer.Option(help="Peak rate of AdamW for everything else.")] = 1e-3,
    questions: Annotated[int, typer.Option(min=0, help="At least this many test questions; 0 tests nothing.")] = 1000,
    adapters: Annotated[
        Path | None, typer.Option(help="Where the projectors of the first seed, trained alone, go in bfloat16.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1,
) -> None:
    """Train condensing projectors, test them, and print accuracies as mean and range over seeds."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    budget = Phase("condense", steps, batch_size, muon_rate, adam_rate, 0.0, min_items=1)
    asked_kinds = _names(kinds, "--kinds", tuple(METHODS))
    offered = [
        Variant(kind, sides[0] if len(sides) == 1 else tuple(sides))
        for sides in (_numbers(text.replace("+", ","), "--scales", (1, 2, 4, 8, 16)) for text in scales.split(","))
        for kind in asked_kinds
        if (sides != [1] or kind == "average") and (len(sides) == 1 or kind != "shuffle")
    ]
    variants = list(dict.fromkeys(offered))
    drawn = _numbers(seeds, "--seeds")
    every: list[Run] = []
    for part in _names(parts, "--parts", PARTS):
        for seed in drawn if part == "projector" else drawn[:1]:
            runs = [Run(variant, part, seed) for variant in variants]
            every += runs
            if missing := [run for run in runs if None in (read_result(out, run, s) for s in run.variant.scales)]:
                train(missing, budget, out)
    points = [(run, scale) for run in every for scale in run.variant.scales]
    for run, scale in points:
        record = read_result(out, run, scale)
        if questions and "test" not in record:
            result = test(run, scale, out, questions)
            write_result(out, run, scale, record | {"test": {"hits": result.hits, "asked": result.asked}})
    if adapters is not None:
        for run in every:
            if (run.part, run.seed) == ("projector", drawn[0]) and run.variant.scale != 1:
                typer.echo(f"wrote {ship(run, out, adapters)}")
    Console(width=170).print(condense_table.render([read_result(out, *point) for point in points]))


def _names(text: str, option: str, allowed: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if not set(names) <= set(allowed):
        raise typer.BadParameter(f"must be of {', '.join(allowed)}, with commas, got {text!r}", param_hint=option)
    return names


def _numbers(text: str, option: str, allowed: Sequence[int] | None = None) -> list[int]:
    names = [part.strip() for part in text.split(",")]
    numbers = list(dict.fromkeys(int(name) for name in names if name.isdecimal()))
    if not all(name.isdecimal() for name in names) or (allowed and not set(numbers) <= set(allowed)):
        what = f"of {', '.join(map(str, allowed))}," if allowed else "numbers from 0"
        raise typer.BadParameter(f"must be {what} with commas, got {text!r}", param_hint=option)
    return numbers


if __name__ == "__main__":
    typer.run(main)
