"""What a prompt with an image costs, part by part: unpruned, pruned, and beside a natively short prompt.

    python -m eval.cost
    python -m eval.cost --shape qwen2.5-vl-7b --scale 0.25 --methods "divprune;fastv" --keep-ratios 0.5,0.1
    python -m eval.cost --shape overhead --methods "stride;todre,stages=(1,);todre,tau=0.0" --keep-ratios 0.1
    python -m eval.cost --model FOLDER --device cuda --dtype bfloat16

An answer is `generate` with the default cache. It is taken apart by hooks into the vision tower, the projector, the
selector's picking, the rest of the prefill, the decoded tokens, and what generate does between. The natively short
prompt has no hooks: the same model encodes the same image and answers from as many embeddings as pruning leaves, so
that the ratio to it is what pruning itself costs; the shape "overhead" has next to no tower, which would hide that.
All answer in turns, each with and without hooks; a ratio is the median over the rounds of the ratios within a round.

Weights of a shape are random. --scale shrinks layers, heads and feed-forward widths; tokens stay as many. docs/costs.md
has the formula of the operations, and how scaling changes the shares of the parts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from eval import options
from eval.cost import report, shapes
from eval.cost.bench import Bench, Inputs, cases
from eval.measure import machine
from eval.tables import sentence, write_json
from vltok.errors import VltokError

QUICK = {"rounds": 3, "seconds": 60.0, "new_tokens": 8}
QUESTION = "What is in this picture and where is it? "


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    shared = options.common(
        "device",
        "threads",
        "dtype",
        "rounds",
        "seconds",
        "quick",
        "out",
        rounds=7,
        seconds=600.0,
        out=Path("cost-results"),
    )
    command = options.parser(__doc__, shared)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--shape", choices=shapes.SHAPES, default="llava-1.5-7b", help="random weights (%(default)s)")
    which.add_argument("--model", type=Path, help="a folder of save_pretrained, with the processor; used as it is")
    command.add_argument("--scale", type=_scale, help="of a shape, in (0, 1]; 0.125, and 1 for overhead")
    command.add_argument("--methods", default="divprune;todre", help='as text, with semicolons ("%(default)s")')
    command.add_argument("--keep-ratios", type=options.shares, default="0.25,0.1", help="budgets (%(default)s)")
    command.add_argument("--text-tokens", type=options.count, default=40, help="of the prompt, about (%(default)s)")
    command.add_argument("--new-tokens", type=_new_tokens, default=16, help="of an answer, from 2 on (%(default)s)")
    command.add_argument("--image-side", type=options.count, help="pixels; by default the shape's, of a folder 336")
    return options.parse(command, argv, QUICK)


def main(argv: Sequence[str] | None = None) -> None:
    began, asked = time.perf_counter(), read(argv)
    try:
        bench, title = set_up(asked)
        rows = bench.measure(cases(asked.methods.split(";"), asked.keep_ratios), asked.rounds, asked.seconds)
    except (VltokError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    about = machine(asked.device)
    shown, said = report.table(rows, title), report.words(rows, bench.inputs["input_ids"].shape[1])
    asked.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    rest = {"settings": settings, "title": title, "words": said, "rows": [asdict(row) for row in rows]}
    write_json(asked.out / "cost.json", {"machine": about} | rest)
    (asked.out / "cost.md").write_text("\n".join([shown.markdown(), *(f"- {each}" for each in said)]) + "\n")
    report.plot(rows, title, asked.out / "cost.png")
    print(shown.text(), *said, sentence(about), sep="\n")
    print(f"written to {asked.out} in {time.perf_counter() - began:.0f} s")


def set_up(asked: argparse.Namespace) -> tuple[Bench, str]:
    """The model and its prompt, and what they are in words."""
    dtype, common = options.DTYPES[asked.dtype], f"{asked.dtype}, {asked.device}, {asked.new_tokens} new tokens"
    if asked.model is None:
        shape = shapes.SHAPES[asked.shape]
        asked.scale = asked.scale or shape.scale
        model = shapes.build(shape.scaled(asked.scale)).to(asked.device, dtype)
        with torch.device("meta"):
            full = shapes.build(shape)
        inputs = shapes.prompt(model, asked.image_side or shape.side, asked.text_tokens)
        title = f"{asked.shape} x {asked.scale:g}: {shape.scaled(asked.scale)}; {common}"
        return Bench(model, lambda: inputs, full=full, new_tokens=asked.new_tokens), title
    model = transformers.AutoModelForImageTextToText.from_pretrained(asked.model, dtype=dtype, local_files_only=True)
    processor = transformers.AutoProcessor.from_pretrained(asked.model, local_files_only=True)
    model = model.eval().to(asked.device)
    model.generation_config.eos_token_id = None
    ask = asking(model, processor, asked.image_side or 336, asked.text_tokens)
    return Bench(model, ask, processor, new_tokens=asked.new_tokens), f"{asked.model}; {common}"


def asking(model: nn.Module, processor: Any, side: int, text_tokens: int) -> Callable[[], Inputs]:
    """Make what asks a question of about so many tokens about an image of noise, by the processor as it is then."""
    pixels = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = QUESTION * max(1, round(text_tokens / max(1, len(processor.tokenizer.tokenize(QUESTION)))))

    def ask() -> Inputs:
        if getattr(processor, "chat_template", None):
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
            text = processor.apply_chat_template([turn], add_generation_prompt=True)
        else:
            text = f"{processor.image_token} {words}"
        found = processor(images=[pixels], text=[text], return_tensors="pt")
        return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in found.items()}

    return ask


def _scale(text: str) -> float:
    return options.shares(text)[0]


def _new_tokens(text: str) -> int:
    if (found := options.count(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, so that one is decoded, got {found}")
    return found


if __name__ == "__main__":
    main()
