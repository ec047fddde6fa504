"""Train projectors that condense visual tokens, on the shipped canvas model: `python -m eval.canvas.condense`.

TokenPacker, pixel shuffle, average pooling and the plain projector start from the model's own projector and get the
same pictures in the same order, the same optimizers and rates. Part "projector" trains the projector alone; part "lm"
also the language model. The tower is frozen in both. A run whose results are in the folder is not trained again. A
projector for several scale factors sees each batch at one of them and is tested at each.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

import vltok
from eval import options
from eval.canvas import condense_table
from eval.canvas.attention import use_block_attention
from eval.canvas.batches import Batch, BatchStream
from eval.canvas.data import KINDS, Canvases, kinds_known
from eval.canvas.losses import answer_loss
from eval.canvas.model import MODEL_DIR, load
from eval.canvas.runner import Case, Result, draw_questions, encode, evaluate
from eval.canvas.steps import Phase, make_optimizers, take_step
from eval.canvas.train import BLOCKS
from eval.canvas.variants import METHODS, Variant, levels, tokens_at
from eval.store import Store

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
        self.optimizers = make_optimizers(trained, muon=bool(budget.muon_rate))
        self.seconds = 0.0

    def answers(self, states: Sequence[torch.Tensor], batch: Batch, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers' loss and the hits per kind at a scale; `states` are the tower's hidden states, CLS first."""
        features = torch.cat([states[level][:, 1:] for level in self.levels], dim=-1)
        with at_scale(self.handle, scale):
            projected = self.projector(features)
        return answer_loss(self.model, projected, batch.condensed(tokens_at(scale)))

    def step(self, number: int, states: Sequence[torch.Tensor], batch: Batch) -> float:
        """Learn from one batch; returns the loss. Of several scales the number of the step draws one."""
        started = time.perf_counter()
        loss = self.answers(states, batch, random.Random(number).choice(self.run.variant.scales))[0]
        take_step(loss, self.optimizers, number, self.budget, self.run.name)
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
        figures = {kind: (hits[0, k] / hits[1, k]).item() for k, kind in enumerate(KINDS) if hits[1, k]}
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
    tokenizer = processor.tokenizer
    known = kinds_known(tokenizer.get_vocab())
    validation = BatchStream(Canvases("val", 0, kinds=known), tokenizer, 8, VAL_BATCHES, BLOCKS)
    seen = [(tower_states(base, batch), batch) for batch in (validation[number] for number in range(len(validation)))]
    log = (out / "log.jsonl").open("a", buffering=1)

    def note(learner: Learner, step: int, **record: object) -> None:
        log.write(json.dumps({"run": learner.run.name, "step": step, "seconds": learner.seconds, **record}) + "\n")

    before = {learner.run: learner.validate(seen) for learner in learners}
    for learner in learners:
        note(learner, 0, val=before[learner.run])
    canvases = Canvases("train", FIRST_SEED + seed, kinds=known)
    stream = BatchStream(canvases, tokenizer, budget.batch_size, budget.steps, BLOCKS)
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
        save_file(learner.trained.state_dict(), weights_file(out, learner.run))
        parameters = sum(p.numel() for p in learner.trained.parameters())
        for scale, after in figures.items():
            record = {"untrained": before[learner.run][scale], "val": after}
            record |= {"seconds": learner.seconds, "parameters": parameters}
            Store(out).write(learner.run.name, settings(learner.run, scale, budget), record)
    log.close()


def settings(run: Run, scale: int, budget: Phase) -> dict[str, object]:
    """What the result of a run at a scale hangs on."""
    variant = run.variant
    return {
        "kind": variant.kind if len(variant.scales) == 1 else variant.name,
        "scale": scale,
        "part": run.part,
        "seed": run.seed,
        "tokens": tokens_at(scale),
        "budget": asdict(budget),
        "model": hashlib.sha256((MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()[:16],
    }


def weights_file(out: Path, run: Run) -> Path:
    """Where the trained weights of a run are."""
    return out / f"{run.name}.safetensors"


def test(run: Run, scale: int, out: Path, questions: int, seed: int = 0) -> Result:
    """Answer test questions with a trained run at a scale, through the processor and `model.generate`."""
    model, processor = load()
    trained = nn.ModuleList([run.variant.put_on(model, processor)])
    if run.part == "lm":
        trained.append(model.model.language_model)
    trained.load_state_dict(load_file(weights_file(out, run)))
    (handle,) = vltok.handles(model)
    with at_scale(handle, scale):
        canvases = Canvases("test", seed, kinds=kinds_known(processor.tokenizer.get_vocab()))
        asked = draw_questions(canvases, questions)
        batches = encode(processor, canvases, asked, 8, wrong_image=False)
        return evaluate(model.eval(), processor, Case(run.name, 1 / scale**2), batches, asked)


def ship(run: Run, out: Path, folder: Path) -> Path:
    """Write the trained projector of a run as an adapter in bfloat16, a folder for vltok.load."""
    model, processor = load()
    handle = vltok.apply(model, run.variant.method(), processor=processor)
    (projector,) = handle.added_modules
    nn.ModuleList([projector]).load_state_dict(load_file(weights_file(out, run)))
    projector.to(torch.bfloat16)
    folder = folder / run.variant.name
    vltok.save(handle, folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Train condensing projectors, test them, and print accuracies as mean and range over seeds."""
    given = _options(argv)
    torch.set_flush_denormal(True)
    given.out.mkdir(parents=True, exist_ok=True)
    budget = Phase("condense", given.steps, given.batch_size, given.muon_rate, given.adam_rate, 0.0, min_items=1)
    # The plain projector is one, whatever the kind; pixel shuffle is made for one scale.
    variants = [
        Variant(kind, sides[0] if len(sides) == 1 else sides)
        for sides in given.scales
        for kind in given.kinds
        if (sides != (1,) or kind == "average") and (len(sides) == 1 or kind != "shuffle")
    ]
    store, every = Store(given.out), []
    for part in given.parts:
        for seed in given.seeds if part == "projector" else given.seeds[:1]:
            runs = [Run(variant, part, seed) for variant in dict.fromkeys(variants)]
            every += [(run, scale) for run in runs for scale in run.variant.scales]
            done = {run: [store.read(run.name, settings(run, s, budget)) for s in run.variant.scales] for run in runs}
            if missing := [run for run in runs if None in done[run]]:
                train(missing, budget, given.out)
    records = []
    for run, scale in every:
        record = {"run": settings(run, scale, budget)} | store.read(run.name, settings(run, scale, budget))
        if given.questions:
            asked = {**settings(run, scale, budget), "questions": given.questions}
            record["test"] = store.get(
                f"{run.name}-test", asked, partial(_tested, run, scale, given.out, given.questions)
            )
        records.append(record)
    if given.adapters is not None:
        for run in dict.fromkeys(run for run, _ in every):
            if (run.part, run.seed) == ("projector", given.seeds[0]) and run.variant.scale != 1:
                print(f"wrote {ship(run, given.out, given.adapters)}")
    print(condense_table.render(records).text())


def _tested(run: Run, scale: int, out: Path, questions: int) -> dict[str, dict[str, int]]:
    result = test(run, scale, out, questions)
    return {"hits": dict(result.hits), "asked": dict(result.asked)}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    command = options.parser(__doc__, options.common("out", "threads", out=Path("canvas-run/condense")))
    command.add_argument("--kinds", type=_names(METHODS), default="average,tokenpacker", help="projectors, with commas")
    command.add_argument(
        "--scales",
        type=_scales,
        default="1,2,4",
        help="sides of a region of patches, with commas; 1 is the plain projector, 2+4 one projector for both",
    )
    command.add_argument("--seeds", type=_seeds, default="0,1,2", help="of part projector; part lm takes the first")
    command.add_argument(
        "--parts", type=_names(PARTS), default="projector,lm", help="what learns: projector (alone), lm (with it)"
    )
    command.add_argument("--steps", type=options.count, default=400, help="of each run (%(default)s)")
    command.add_argument("--batch-size", type=options.count, default=8, help="canvases of a step (%(default)s)")
    command.add_argument("--muon-rate", type=float, default=0.005, help="peak, of matrices; 0: none (%(default)s)")
    command.add_argument("--adam-rate", type=float, default=1e-3, help="peak, of everything else (%(default)s)")
    command.add_argument("--questions", type=int, default=1000, help="of the test; 0: none (%(default)s)")
    command.add_argument("--adapters", type=Path, help="where the first seed's projectors go, in bfloat16")
    return options.parse(command, argv)


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if not set(names) <= set(allowed):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, with commas, got {text!r}")
        return names

    return read


def _scales(text: str) -> list[tuple[int, ...]]:
    sides = [tuple(dict.fromkeys(options.numbers(part.replace("+", ",")))) for part in text.split(",")]
    if not {side for part in sides for side in part} <= {1, 2, 4, 8, 16}:
        raise argparse.ArgumentTypeError(f"must be of 1, 2, 4, 8, 16, with commas, got {text!r}")
    return sides


def _seeds(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be numbers from 0, with commas, got {text!r}")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


if __name__ == "__main__":
    main()
