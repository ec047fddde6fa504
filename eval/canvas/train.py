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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval import options
from eval.canvas.attention import use_block_attention
from eval.canvas.batches import Batch, BatchStream, quadrant_word_ids
from eval.canvas.data import KINDS, Canvases, Items, digits, load_items
from eval.canvas.losses import Heads, alignment_loss, answer_loss, tower_features, tower_loss
from eval.canvas.model import build_model, build_processor, build_tokenizer, export, load
from eval.canvas.steps import Phase, average, make_optimizers, take_step

TOWER_PHASES = ("crops", "tower")
BLOCKS = 12  # question blocks per picture, at most


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
                    self._log({"phase": phase.name, "step": self.step, "seconds": self.seconds, **average(recent)})
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
        stream = BatchStream(Canvases("val", 0, self.items, kinds=KINDS), self.tokenizer, 16, batches, BLOCKS)
        towers, hits = [], torch.zeros(2, len(KINDS))
        for number in range(batches):
            batch = stream[number]
            patches, cls = tower_features(self.model, batch)
            towers.append(tower_loss(self.heads, patches, cls, batch)[1])
            if phase.name not in TOWER_PHASES:
                hits += answer_loss(self.model, self.model.model.multi_modal_projector(patches), batch)[1]
        self.model.train()
        figures = average(towers)
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
        take_step(loss, self.optimizers, self.step, phase, f"phase {phase.name}")
        return figures | {"loss": loss.item()}

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the current phase's parts and of the readouts."""
        name = self.phases[min(self.phase, len(self.phases) - 1)].name
        inner = self.model.model
        tower, language = [inner.vision_tower], [inner.multi_modal_projector, inner.language_model]
        parts = {"crops": tower, "tower": tower, "language": language, "joint": tower + language}[name]
        return make_optimizers(parts, self.heads.parameters(), weight_decay=0.02)

    def _batches(self, phase: Phase) -> Iterator[Batch]:
        seed = 1000 * self.seed + self.phase + 1
        canvases = Canvases("train", seed, self.items, phase.min_items, KINDS)
        stream = BatchStream(
            canvases, self.tokenizer, phase.batch_size, phase.steps, BLOCKS, crops=phase.name == "crops"
        )
        left = range(self.step, phase.steps)
        return iter(DataLoader(stream, batch_size=None, sampler=left, num_workers=self.workers))

    def _log(self, record: dict) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Train the tiny LLaVA of canvas VQA on digits and photos from installed packages."""
    common = options.common("out", "threads", out=Path("canvas-run"))
    command = options.parser(__doc__, common)
    command.add_argument("--model-out", type=Path, help="where the trained model goes (OUT/model)")
    command.add_argument("--items", type=Path, help="other item pictures, .npz (see eval.canvas.data.load_items)")
    command.add_argument("--seed", type=int, default=0, help="of start values and canvases (%(default)s)")
    for phase, steps in (("crop", 1200), ("tower", 1200), ("language", 500), ("joint", 2000)):
        command.add_argument(f"--{phase}-steps", type=int, default=steps, help="steps of that phase (%(default)s)")
    command.add_argument("--workers", type=int, default=1, help="processes that draw; 0: none (%(default)s)")
    command.add_argument("--minutes", type=float, help="stop with a checkpoint after about this long")
    command.add_argument("--start", type=Path, help="folder of a trained model whose weights are taken to start with")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    given = options.parse(command, argv)
    phases = [
        Phase("crops", given.crop_steps, 32, 0.02, 2e-3, 0.3, min_items=6),
        Phase("tower", given.tower_steps, 8, 0.01, 1e-3, 0.1, min_items=1),
        Phase("language", given.language_steps, 8, 0.01, 2e-3, 0.6, min_items=1),
        Phase("joint", given.joint_steps, 8, 0.006, 1e-3, 0.0, min_items=1),
    ]
    items = digits() if given.items is None else load_items(given.items)
    trainer = Trainer(given.out, items, given.seed, phases, given.workers)
    if given.start is not None:
        trainer.start_from(given.start)
    if given.resume:
        trainer.resume()
    if trainer.run(given.minutes):
        folder = given.model_out or given.out / "model"
        export(trainer.model, trainer.processor, folder)
        print(f"trained for {trainer.seconds / 60:.1f} minutes; the model is in {folder}")


if __name__ == "__main__":
    main()
