"""What pruning itself costs: a pruned model against the same model that was handed the few tokens to begin with.

    python -m eval.overhead
    python -m eval.overhead --device cuda --json overhead.json

Every side runs the vision tower and the projector on the picture and then `generate`: prefill and 16 decode steps with
the default dynamic cache. The native side has no hooks and no placeholders; it gets the embeddings of the kept tokens
and of the text, prepared beforehand, and answers token for token what the pruned side answers (checked beforehand).
The tower is made tiny, so that equal work on both sides doesn't hide the difference. The decode steps are compared once
more by themselves: steps on a pruned cache against steps on a native one that holds as many entries. Sides run in turns
in one process; a ratio is the median over the rounds of the ratios within a round. On one CPU thread the clock is that
thread's own CPU time, so that other programs on the machine don't count.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import Cache, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vltok
from vltok.visual import VisualTokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATCH = 14
VOCABULARY = 32_000
PLACEHOLDER = VOCABULARY - 1


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and the prompt.

    Attributes:
        layers: Decoder layers.
        width: Width of the decoder.
        visual_tokens: Visual tokens of the picture, a square number.
        text_tokens: Text tokens, three quarters of them after the picture.
        keep_ratio: Share of the visual tokens that is kept.
        decode_steps: Steps after the prefill.
    """

    layers: int = 24
    width: int = 1024
    visual_tokens: int = 576
    text_tokens: int = 40
    keep_ratio: float = 0.1
    decode_steps: int = 16


@dataclass(frozen=True)
class Result:
    """How one side compares with the native side.

    Attributes:
        side: Its name.
        ratio: Median ratio to the native side, of the whole answer or of decode steps alone.
        quartiles: The middle half of the ratios.
        milliseconds: Median time; for orientation, it holds for this machine at this hour only.
        goal: What the ratio should not exceed.
    """

    side: str
    ratio: float
    quartiles: tuple[float, float]
    milliseconds: float
    goal: float | None


@dataclass(frozen=True)
class Fixed(vltok.Selector):
    """Keep tokens known beforehand: pruning with the selection taken out."""

    indices: torch.Tensor | None = None

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        return self.indices


def build(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """A LLaVA with random weights: a Llama decoder of the given shape behind a tiny CLIP tower."""
    torch.manual_seed(0)
    side = round(shape.visual_tokens**0.5)
    if side * side != shape.visual_tokens:
        raise typer.BadParameter(f"must be a square number, got {shape.visual_tokens}", param_hint="--visual-tokens")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side * PATCH,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.width * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
        ),
        image_token_index=PLACEHOLDER,
    )
    model = LlavaForConditionalGeneration(config).eval().to(device, dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PLACEHOLDER]
    return model


class Bench:
    """One model and one prompt, to be answered from the whole picture or from the tokens that are kept of it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        self.model = build(shape, dtype, device)
        size = self.model.config.vision_config.image_size
        self.pixels = torch.randn(1, 3, size, size).to(device, dtype)
        text = torch.randint(3, PLACEHOLDER, (1, shape.text_tokens))
        before = shape.text_tokens // 4
        picture = torch.full((1, shape.visual_tokens), PLACEHOLDER)
        self.ids = torch.cat([text[:, :before], picture, text[:, before:]], dim=1).to(device)
        self.kept, self.short = self._prepare()

    @torch.no_grad()
    def _prepare(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What ToDRE keeps of the picture, (1, K), and the embeddings of the short prompt, (1, S, D)."""
        with vltok.apply(self.model, vltok.ToDRE(self.shape.keep_ratio, relevance=False)) as handle:
            self.model(input_ids=self.ids, pixel_values=self.pixels, logits_to_keep=1)
            kept = handle.report(file=None).keep_indices[0][0]
        features = torch.cat(list(self.encode())).flatten(0, -2)[kept]
        embeds = self.model.get_input_embeddings()(self.ids)[0]
        visual = (self.ids[0] == PLACEHOLDER).nonzero().squeeze(1)
        short = torch.cat([embeds[: visual[0]], features, embeds[visual[-1] + 1 :]])
        return kept.unsqueeze(0), short.unsqueeze(0)

    @torch.no_grad()
    def encode(self) -> Any:
        """Run the vision tower and the projector."""
        return self.model.model.get_image_features(self.pixels).pooler_output

    def answer(self, **inputs: torch.Tensor) -> Any:
        """Prefill and decode; every side makes the same number of steps."""
        steps = self.shape.decode_steps + 1  # the prefill gives the first token
        return self.model.generate(
            **inputs, min_new_tokens=steps, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True
        )

    def whole(self) -> Any:
        """Answer from the whole picture, pruned by whatever is attached."""
        return self.answer(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), pixel_values=self.pixels)

    def native(self) -> Any:
        """Answer from the short embeddings."""
        self.encode()
        mask = torch.ones(self.short.shape[:2], dtype=torch.int64, device=self.short.device)
        return self.answer(inputs_embeds=self.short, attention_mask=mask)

    def check(self) -> None:
        """Make sure that the native side and the pruned side do the same: equal answers from caches of equal lengths.

        Raises:
            RuntimeError: If they don't.
        """
        native = self.native()
        with vltok.apply(self.model, Fixed(self.shape.keep_ratio, positions="reindex", indices=self.kept)):
            pruned = self.whole()
        answer = pruned.sequences[:, self.ids.shape[1] :]
        lengths = [[layer.keys.shape[-2] for layer in cache_of(side).layers] for side in (native, pruned)]
        if not torch.equal(answer, native.sequences) or lengths[0] != lengths[1]:
            raise RuntimeError(f"the sides differ: {native.sequences} and {answer}, KV entries {lengths}")

    def steps(self, answer: Any) -> Callable[[], None]:
        """Decode steps on a copy of the cache of an answer, made beforehand, to be run."""
        cache, token = copy.deepcopy(cache_of(answer)), self.ids[:, -1:]
        words = inspect.signature(self.model.forward).parameters
        name = next(word for word in ("cache", "past_key_values") if word in words)

        @torch.no_grad()
        def run() -> None:
            for _ in range(self.shape.decode_steps):
                length = cache.get_seq_length()
                positions = torch.full_like(token, length)
                mask = torch.ones(1, length + 1, dtype=torch.int64, device=token.device)
                self.model(input_ids=token, attention_mask=mask, position_ids=positions, **{name: cache})

        return run


def cache_of(output: Any) -> Cache:
    """The KV cache of an answer, which versions of transformers name differently."""
    return next(value for value in output.values() if isinstance(value, Cache))


@dataclass(frozen=True)
class Side:
    """One thing that is timed.

    Attributes:
        method: What is attached.
        prepare: Makes what is to be run, while the method is on.
        base: Name of the side it is compared with, or None for a native one.
        goal: What the ratio should not exceed.
    """

    method: vltok.Method | None
    prepare: Callable[[], Callable[[], Any]]
    base: str | None
    goal: float | None = None


def sides(bench: Bench) -> dict[str, Side]:
    """All that is timed, by name."""
    ratio = bench.shape.keep_ratio
    fixed = Fixed(ratio, indices=bench.kept)
    native = bench.native()
    with vltok.apply(bench.model, fixed):
        pruned = bench.whole()
    return {
        "native": Side(None, lambda: bench.native, None),
        "pruning, selection taken out": Side(fixed, lambda: bench.whole, "native", 1.02),
        "ToDRE, stage 1": Side(vltok.ToDRE(ratio, relevance=False), lambda: bench.whole, "native", 1.05),
        "ToDRE, stages 1+2, nothing dropped": Side(vltok.ToDRE(ratio, tau=0.0), lambda: bench.whole, "native"),
        "not pruned": Side(None, lambda: bench.whole, "native"),
        "native decode steps": Side(None, lambda: bench.steps(native), None),
        "decode steps on a pruned cache": Side(fixed, lambda: bench.steps(pruned), "native decode steps", 1.03),
    }


def measure(bench: Bench, rounds: int, console: Console) -> list[Result]:
    """Time all sides in turns."""
    own_time = bench.ids.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    wait = torch.cuda.synchronize if bench.ids.device.type == "cuda" else lambda: None

    def timed(side: Side) -> float:
        with vltok.apply(bench.model, side.method) if side.method else nullcontext():
            run = side.prepare()
            gc.collect()
            wait()
            start = clock()
            run()
            wait()
            return clock() - start

    compared = sides(bench)
    gc.collect()
    gc.freeze()  # what is here already stays, and needs no look before every measurement
    times: dict[str, list[float]] = {name: [] for name in compared}
    for number in track(range(rounds + 1), description="rounds", console=console, transient=True):
        order = list(times)
        shift = number % len(order)  # nobody always runs first
        for name in order[shift:] + order[:shift]:
            seconds = timed(compared[name])
            if number > 0:  # the first round warms up
                times[name].append(seconds)
    gc.unfreeze()
    results = []
    for name, side in compared.items():
        if side.base is not None:
            ratios = [taken / native for taken, native in zip(times[name], times[side.base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
            results.append(Result(name, middle, (low, high), statistics.median(times[name]) * 1e3, side.goal))
    return results


def main(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")] = 15,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = Shape.layers,
    width: Annotated[int, typer.Option(min=64, help="Width of the decoder, a multiple of 64.")] = Shape.width,
    visual_tokens: Annotated[int, typer.Option(min=4, help="A square number.")] = Shape.visual_tokens,
    keep_ratio: Annotated[float, typer.Option(help="Share of the visual tokens to keep.")] = Shape.keep_ratio,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure what pruning costs on top of running the short prompt."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {dtype!r}", param_hint="--dtype")
    torch.set_num_threads(threads)
    shape = Shape(layers=layers, width=width, visual_tokens=visual_tokens, keep_ratio=keep_ratio)
    bench = Bench(shape, DTYPES[dtype], device)
    bench.check()
    results = measure(bench, rounds, Console(stderr=True))

    title = f"{layers} layers x {width}, {visual_tokens} -> {bench.kept.shape[1]} visual tokens, {dtype}, {device}"
    table = Table("", "time / native", "middle half", "goal", "ms", title=title)
    for result in results:
        low, high = result.quartiles
        goal = "" if result.goal is None else f"<= {result.goal}"
        table.add_row(result.side, f"{result.ratio:.3f}", f"{low:.3f} - {high:.3f}", goal, f"{result.milliseconds:.1f}")
    Console().print(table)
    if json_file is not None:
        setting = {"dtype": dtype, "device": device, "threads": threads, "rounds": rounds, "torch": torch.__version__}
        content = {**setting, "shape": asdict(shape), "results": [asdict(result) for result in results]}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
