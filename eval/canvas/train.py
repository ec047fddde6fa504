"""Train the tiny LLaVA of canvas VQA from fresh weights: `python -m eval.canvas.train`.

Four phases. "crops" and "tower": the CLIP tower alone on 64-pixel windows, then on whole canvases, with dense targets
on its patches and presence and count on its CLS. "language": the projector and the language model on answers, over the
frozen tower, whose readouts go on learning. "joint": everything together, all losses on. The language model always sees
all 256 visual tokens. A stopped run goes on from its last checkpoint with `--resume`; with `--start` it begins with the
weights of a trained model, so that it can do with fewer phases.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.canvas.attention import use_block_attention
from eval.canvas.batches import Batch, BatchStream, quadrant_word_ids
from eval.canvas.data import KINDS, Canvases, Items, digits, load_items
from eval.canvas.losses import Heads, alignment_loss, answer_loss, tower_features, tower_loss
from eval.canvas.model import build_model, build_processor, build_tokenizer, export, load
from eval.canvas.muon import Muon

TOWER_PHASES = ("crops", "tower")
BLOCKS = 12  # question blocks per picture, at most


@dataclass(frozen=True)
class Phase:
    """One training phase: how many steps of which batch, at which peak rate; the rate falls to `end` of it."""

    name: str
    steps: int
    batch_size: int
    muon_rate: float
    adam_rate: float
    end: float
    min_items: int


class Trainer:
    """Everything that a step needs and a checkpoint holds."""

    def __init__(self, out: Path, items: Items, seed: int, phases: list[Phase], workers: int) -> None:
        self.out, self.items, self.seed, self.phases, self.workers = out, items, seed, phases, workers
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer(items.names)
        self.processor = build_processor(self.tokenizer)
        self.model = build_model(self.tokenizer)
        use_block_attention(self.model.model.language_model)
        self.heads = Heads(self.model.config.vision_config.hidden_size, len(items.names))
        ids = self.tokenizer.get_vocab()
        self.label_ids = torch.tensor([ids[name] for name in items.names])
        self.quadrant_ids = quadrant_word_ids(ids)
        self.phase, self.step, self.seconds = 0, 0, 0.0
        self.optimizers = self._new_optimizers()
        out.mkdir(parents=True, exist_ok=True)

    def start_from(self, folder: Path) -> None:
        """Take the weights of a trained model; words that it does not know keep their start values.

        Raises:
            ValueError: If the words that it knows have other numbers here.
        """
        trained, processor = load(folder)
        known, ids = processor.tokenizer.get_vocab(), self.tokenizer.get_vocab()
        if not known.items() <= ids.items():
            raise ValueError(f"the words of the model in {folder} are other ones: {sorted(known)}, not {sorted(ids)}")
        weights = trained.state_dict()
        for name, own in self.model.state_dict().items():
            own[: len(weights[name])] = weights[name]

    def run(self, minutes: float | None = None) -> bool:
        """Train to the end, or for about `minutes`. Returns whether all phases are done."""
        started = time.monotonic()
        self._log(
            {"event": "start", "phases": [asdict(phase) for phase in self.phases], "seed": self.seed, "step": self.step}
        )
        while self.phase < len(self.phases):
            phase = self.phases[self.phase]
            bar = tqdm(total=phase.steps, initial=self.step, desc=phase.name, mininterval=5, dynamic_ncols=True)
            last_saved = clock = time.monotonic()
            recent: list[dict[str, float]] = []
            for batch in self._batches(phase):
                recent.append(self._train_step(phase, batch))
                self.step += 1
                self.seconds += time.monotonic() - clock
                clock = time.monotonic()
                bar.update()
                if self.step % 25 == 0:
                    self._log({"phase": phase.name, "step": self.step, "seconds": self.seconds, **_average(recent)})
                    recent = []
                if self.step % 250 == 0 or self.step == phase.steps:
                    figures = self.validate(phase)
                    self._log({"phase": phase.name, "step": self.step, "seconds": self.seconds, "val": figures})
                    bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
                    clock = time.monotonic()
                if clock - last_saved > 120:
                    self.save()
                    last_saved = clock = time.monotonic()
                if minutes is not None and clock - started > 60 * minutes:
                    self.save()
                    return False
            bar.close()
            self.phase, self.step = self.phase + 1, 0
            self.optimizers = self._new_optimizers()
            self.save()
        return True

    @torch.no_grad()
    def validate(self, phase: Phase, batches: int = 8) -> dict[str, float]:
        """Accuracies on the same 128 validation canvases each time."""
        self.model.eval()
        stream = BatchStream(Canvases("val", 0, self.items), self.tokenizer, 16, batches, BLOCKS)
        towers, hits = [], torch.zeros(2, len(KINDS))
        for number in range(batches):
            batch = stream[number]
            patches, cls = tower_features(self.model, batch)
            towers.append(tower_loss(self.heads, patches, cls, batch)[1])
            if phase.name not in TOWER_PHASES:
                hits += answer_loss(self.model, self.model.model.multi_modal_projector(patches), batch)[1]
        self.model.train()
        figures = _average(towers)
        if phase.name not in TOWER_PHASES:
            figures |= {kind: (hits[0, k] / hits[1, k]).item() for k, kind in enumerate(KINDS)}
        return figures

    def save(self) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        weights = {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()}
        weights |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        save_file(weights, self.out / "checkpoint.safetensors.new")
        state = {
            "phase": self.phase,
            "step": self.step,
            "seconds": self.seconds,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.out / "checkpoint.pt.new")
        for name in ("checkpoint.safetensors", "checkpoint.pt"):
            os.replace(self.out / f"{name}.new", self.out / name)

    def resume(self) -> None:
        """Go on from the checkpoint in the run's folder.

        Raises:
            ValueError: If there is none, or it is of another model.
        """
        if not (self.out / "checkpoint.pt").exists():
            raise ValueError(f"{self.out} holds no checkpoint to resume from: leave out --resume to start one")
        weights = load_file(self.out / "checkpoint.safetensors")
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        for prefix, module in (("model.", self.model), ("heads.", self.heads)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        self.phase, self.step, self.seconds = state["phase"], state["step"], state["seconds"]
        self.optimizers = self._new_optimizers()
        if self.step:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def _train_step(self, phase: Phase, batch: Batch) -> dict[str, float]:
        factor = rate_factor(self.step, phase)
        for optimizer, rate in zip(self.optimizers, (phase.muon_rate, phase.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        with torch.set_grad_enabled(phase.name != "language"):
            patches, cls = tower_features(self.model, batch)
        loss, figures = tower_loss(self.heads, patches, cls, batch)
        if phase.name not in TOWER_PHASES:
            projected = self.model.model.multi_modal_projector(patches)
            answers, hits = answer_loss(self.model, projected, batch)
            align = alignment_loss(projected, self.model.lm_head.weight, batch, self.label_ids, self.quadrant_ids)
            loss = 0.5 * loss + answers + 0.3 * align
            figures |= {"answers": answers.item(), "align": align.item()}
            figures |= {kind: (hits[0, k] / hits[1, k]).item() for k, kind in enumerate(KINDS) if hits[1, k]}
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {self.step} of phase {phase.name}")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return figures | {"loss": loss.item()}

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the current phase's parts, AdamW for embeddings, norms, biases and heads."""
        name = self.phases[min(self.phase, len(self.phases) - 1)].name
        inner = self.model.model
        tower, language = [inner.vision_tower], [inner.multi_modal_projector, inner.language_model]
        parts = {"crops": tower, "tower": tower, "language": language, "joint": tower + language}[name]
        matrices, others = [], list(self.heads.parameters())
        for part in parts:
            for key, parameter in part.named_parameters():
                (matrices if parameter.ndim == 2 and "embed" not in key else others).append(parameter)
        return [Muon(matrices, weight_decay=0.02), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]

    def _batches(self, phase: Phase) -> Iterator[Batch]:
        seed = 1000 * self.seed + self.phase + 1
        canvases = Canvases("train", seed, self.items, phase.min_items)
        stream = BatchStream(
            canvases, self.tokenizer, phase.batch_size, phase.steps, BLOCKS, crops=phase.name == "crops"
        )
        left = range(self.step, phase.steps)
        return iter(DataLoader(stream, batch_size=None, sampler=left, num_workers=self.workers))

    def _log(self, record: dict) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _average(records: list[dict[str, float]]) -> dict[str, float]:
    names = {name: None for record in records for name in record}
    pairs = {name: [record[name] for record in records if name in record] for name in names}
    return {name: round(sum(values) / len(values), 4) for name, values in pairs.items()}


def rate_factor(step: int, phase: Phase) -> float:
    """Linear warm-up over the first 5 % (at most 100 steps), then linear down to `end`."""
    warm = min(100, max(1, phase.steps // 20))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, phase.steps - warm)
    return 1 - done * (1 - phase.end)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: log.jsonl and checkpoints.")] = Path("canvas-run"),
    model_out: Annotated[Path, typer.Option(help="Where the trained model goes.")] = Path("canvas-run/model"),
    items: Annotated[
        Path | None, typer.Option(help="Other item pictures, .npz (see eval.canvas.data.load_items).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of start values and canvases.")] = 0,
    crop_steps: Annotated[int, typer.Option(help="Steps of the crops phase.")] = 1200,
    tower_steps: Annotated[int, typer.Option(help="Steps of the tower phase.")] = 1200,
    language_steps: Annotated[int, typer.Option(help="Steps of the language phase.")] = 500,
    joint_steps: Annotated[int, typer.Option(help="Steps of the joint phase.")] = 2000,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw canvases; 0 draws in the training process.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop with a checkpoint after about this long.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of a trained model to start from, in the place of fresh weights.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train the tiny LLaVA of canvas VQA on digits and photos from installed packages."""
    torch.set_num_threads(threads)
    phases = [
        Phase("crops", crop_steps, 32, 0.02, 2e-3, 0.3, min_items=6),
        Phase("tower", tower_steps, 8, 0.01, 1e-3, 0.1, min_items=1),
        Phase("language", language_steps, 8, 0.01, 2e-3, 0.6, min_items=1),
        Phase("joint", joint_steps, 8, 0.006, 1e-3, 0.0, min_items=1),
    ]
    trainer = Trainer(out, digits() if items is None else load_items(items), seed, phases, workers)
    if start is not None:
        trainer.start_from(start)
    if resume:
        trainer.resume()
    if trainer.run(minutes):
        export(trainer.model, trainer.processor, model_out)
        typer.echo(f"trained for {trainer.seconds / 60:.1f} minutes; the model is in {model_out}")


if __name__ == "__main__":
    typer.run(main)
