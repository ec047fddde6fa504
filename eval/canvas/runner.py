"""Run canvas questions through `model.generate` with and without a pruning method, and time the prefill."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import BatchFeature, Cache, LlavaForConditionalGeneration, ProcessorMixin
from transformers.utils import ModelOutput

import vltok
from eval.canvas.data import KINDS, ONE_WORD, Canvases, Question
from eval.measure import ratio, timed
from vltok.report import RelevanceRecord

MAX_NEW_TOKENS = 5  # the longest answer and </s>
SCORES = (*KINDS, "box_iou")  # right answers of each kind, and boxes that overlap the right one by half or more
ADAPTERS = Path(__file__).parent / "adapters"  # of `python -m eval.canvas.condense --adapters`
SCALES = (2, 4)  # sides of the regions of patches that condensing projectors make one token of


@dataclass(frozen=True)
class Case:
    """One row of the table: a method at one keep ratio, or the unpruned model without method and adapter.

    Attributes:
        name: In the table.
        keep_ratio: Share of the visual tokens that the language model gets.
        method: What is put on the model.
        wrong_image: Show every question the next canvas instead of its own: what the words alone give.
        adapter: A folder for vltok.load instead of `method`: a method with trained weights.
    """

    name: str
    keep_ratio: float
    method: vltok.Method | None = None
    wrong_image: bool = False
    adapter: Path | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is the model as it is."""
        return self.method is None and self.adapter is None

    @property
    def condenses(self) -> bool:
        """Whether it puts another projector into the model, so that pictures have fewer placeholders."""
        return self.adapter is not None or isinstance(self.method, vltok.AveragePool | vltok.TokenPacker)

    def put_on(
        self, model: LlavaForConditionalGeneration, processor: ProcessorMixin
    ) -> AbstractContextManager[vltok.Handle | None]:
        """Put the case on the model and its processor until the block ends."""
        if self.adapter is not None:
            return vltok.load(model, self.adapter, processor=processor)
        if self.method is not None:
            return vltok.apply(model, self.method, processor=processor)
        return nullcontext()


@dataclass
class Result:
    """What one case gave, summed over all questions."""

    case: Case
    hits: Counter[str] = field(default_factory=Counter)  # of each score
    asked: Counter[str] = field(default_factory=Counter)
    visual_tokens: int = 0  # of all questions, at the entry of the language model
    layer_tokens: float = 0.0  # of all questions, mean over the decoder's layers
    kv_bytes: int = 0  # of all questions, after the prefill
    relevance: list[RelevanceRecord] = field(default_factory=list)  # what ToDRE's stage 2 saw of each prompt
    prefill_ratio: float = float("nan")

    @property
    def total(self) -> int:
        """Questions asked."""
        return sum(self.asked[kind] for kind in KINDS)

    def add(self, part: "Result") -> None:
        """Count the questions of another part of the same case."""
        self.hits.update(part.hits)
        self.asked.update(part.asked)
        self.visual_tokens += part.visual_tokens
        self.layer_tokens += part.layer_tokens
        self.kv_bytes += part.kv_bytes
        self.relevance += part.relevance

    def note(self, question: Question, words: Sequence[str]) -> None:
        """Score the words that a model generated."""
        right = question.answer.split()
        scores = {question.kind: list(words[: len(right)]) == right}
        if question.kind == "box":
            scores["box_iou"] = 2 * intersection_over_union(words[:4], right) >= 1
        self.asked.update(scores.keys())
        self.hits.update(name for name, hit in scores.items() if hit)

    def accuracy(self, score: str) -> float:
        """Share of right answers, 0..1; NaN where nothing was asked."""
        return self.hits[score] / self.asked[score] if self.asked[score] else float("nan")

    def overall(self) -> float:
        """Share of right answers over all questions, 0..1."""
        return sum(self.hits[kind] for kind in KINDS) / self.total


def intersection_over_union(one: Sequence[str], other: Sequence[str]) -> float:
    """How much two boxes overlap, 0..1: words as `Canvas.patch_boxes` has numbers; 0 where one is no box."""
    if not all(len(box) == 4 and all(word.isdecimal() for word in box) for box in (one, other)):
        return 0.0
    boxes = np.array([one, other], np.int64)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).clip(0).prod(axis=1)
    common = (boxes[:, 2:].min(axis=0) - boxes[:, :2].max(axis=0) + 1).clip(0).prod() if areas.all() else 0
    return float(common / max(1, areas.sum() - common))


# Methods by their names in the table, without a keep ratio.
METHODS: dict[str, Callable[..., vltok.Method]] = {
    "ToDRE, stage 1": partial(vltok.ToDRE, relevance=False),
    "ToDRE, stages 1+2": vltok.ToDRE,
    "DivPrune": vltok.DivPrune,
    "FasterVLM": vltok.FasterVLM,
    "VisionZip": vltok.VisionZip,
    "SCOPE": vltok.SCOPE,
    "CDPruner": vltok.CDPruner,
    "stride": vltok.StrideTokens,
    "pool": vltok.Pool,
    "random": vltok.RandomTokens,
}
# The rest of the reference set, and switches on ToDRE's first stage and DivPrune.
FURTHER: dict[str, Callable[..., vltok.Method]] = {
    "VisPruner": vltok.VisPruner,
    "PruMerge+": vltok.PruMergePlus,
    "HoloV": vltok.HoloV,
    "MMTok": vltok.MMTok,
    "DART": vltok.DART,
    "OTPrune": vltok.OTPrune,
    "FastV": vltok.FastV,
    "FastV, 4 x 4 windows": partial(vltok.FastV, window=(4, 4)),
    "PyramidDrop": vltok.PyramidDrop,
    "DART in the decoder": vltok.DARTDecoder,
    "ToDRE, k-center": partial(vltok.ToDRE, relevance=False, strategy="k_center"),
    **{
        f"{name}, {switch}": partial(make, **knobs)
        for name, make in (("ToDRE", partial(vltok.ToDRE, relevance=False)), ("DivPrune", vltok.DivPrune))
        for switch, knobs in {
            "centred": {"correction": "centred"},
            "standardised": {"correction": "standardised"},
            "merging": {"merge": "nearest"},
            "2 x 2 regions": {"regions": (2, 2)},
            "4 x 4 regions": {"regions": (4, 4)},
            "reindex": {"positions": "reindex"},
            "stretch": {"positions": "stretch"},
        }.items()
    },
}


def at(make: Callable[..., vltok.Method], ratio: float, seed: int) -> vltok.Method:
    """A method that keeps a share of the visual tokens; in steps where it has several."""
    if make is vltok.PyramidDrop:
        return make(ratios=(ratio ** (1 / 3), ratio ** (2 / 3), ratio))
    return make(keep_ratio=ratio, **({"seed": seed} if make is vltok.RandomTokens else {}))


def cases(keep_ratios: Sequence[float], seed: int, adapters: Path | None = ADAPTERS, every: bool = False) -> list[Case]:
    """The unpruned model, the wrong-image control, methods at every keep ratio, then condensing projectors.

    `adapters` is the folder of those that were trained for the model, None for a model that has none. `every` takes
    FURTHER, too.
    """
    makers = METHODS | FURTHER if every else METHODS
    fixed = [Case("unpruned", 1.0), Case("unpruned, wrong image", 1.0, wrong_image=True)]
    pruned = [Case(name, ratio, at(make, ratio, seed)) for ratio in keep_ratios for name, make in makers.items()]
    condensed = []
    for scale in SCALES:
        if adapters is not None:
            condensed.append(Case("TokenPacker", scale**-2, adapter=adapters / f"tokenpacker-s{scale}"))
        condensed.append(Case("average pooling", scale**-2, vltok.AveragePool(scale)))
    return fixed + pruned + condensed


def draw_questions(canvases: Canvases, count: int) -> list[Question]:
    """The questions of canvases 0, 1, ... until at least `count` have answers of one word.

    So the pictures are the same whether or not boxes and readings are asked besides.
    """
    questions: list[Question] = []
    index = short = 0
    while short < count:
        asked = canvases.questions(index)
        questions += asked
        short += sum(question.kind in ONE_WORD for question in asked)
        index += 1
    return questions


def encode(
    processor: ProcessorMixin, canvases: Canvases, questions: Sequence[Question], batch_size: int, wrong_image: bool
) -> list[BatchFeature]:
    """Processor outputs of all questions in batches, in order, padded on the left.

    With `wrong_image` every question is shown the canvas after its own.
    """
    pictures = {q.canvas: canvases.canvas(q.canvas + wrong_image).image for q in questions}
    batches = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        batches.append(
            processor(
                images=[pictures[question.canvas] for question in batch],
                text=[f"<image> {question.text}" for question in batch],
                return_tensors="pt",
                padding=True,
                input_data_format="channels_last",
            )
        )
    return batches


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    case: Case,
    batches: Iterable[BatchFeature],
    questions: Sequence[Question],
) -> Result:
    """Answer all questions by greedy generation and count what it cost.

    Args:
        model: In eval mode; the case is put on it and taken off again.
        processor: Decodes the answers.
        case: What to run.
        batches: As made by `encode` for these questions, while the case was on model and processor.
        questions: In the order of the batches.
    """
    result = Result(case)
    num_layers = model.config.text_config.num_hidden_layers
    cache_bytes: list[int] = []

    def note_cache(module: torch.nn.Module, args: tuple, output: ModelOutput) -> None:
        # Versions of transformers differ in what they call the cache of an output.
        cache = next(value for value in output.values() if isinstance(value, Cache))
        cache_bytes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))

    hook = model.register_forward_hook(note_cache)
    asked = iter(questions)
    try:
        with case.put_on(model, processor) as handle:
            for batch in batches:
                inputs = batch.to(model.device, model.dtype)
                cache_bytes.clear()
                output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                for answer in output[:, inputs["input_ids"].shape[1] :].tolist():
                    result.note(next(asked), processor.tokenizer.convert_ids_to_tokens(answer))
                result.kv_bytes += cache_bytes[0]  # the first forward is the prefill
                report = vltok.Report() if handle is None else handle.report(file=None)
                if handle is None or report.condensed is not None:  # the prompt says what the decoder works on
                    result.layer_tokens += float(inputs["attention_mask"].sum())
                    result.visual_tokens += int((inputs["input_ids"] == model.config.image_token_id).sum())
                else:
                    result.layer_tokens += float(report.tokens_per_layer.sum()) / num_layers
                    result.visual_tokens += sum(sum(kept) for kept in report.kept_tokens)
                    result.relevance += [record for sample in report.relevance for record in sample]
    finally:
        hook.remove()
    return result


@torch.inference_mode()
def time_prefill(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    plain: BatchFeature,
    others: Sequence[tuple[Case, BatchFeature]],
    rounds: int,
) -> list[float]:
    """Prefill time of each case as a ratio to the unpruned model, the picture's encoding included.

    Each ratio is within a round, in this process; the median over `rounds` is returned.

    Args:
        model: In eval mode; each case is put on it and taken off again.
        processor: The model's.
        plain: What the unpruned model gets.
        others: The cases, each with the same questions as encoded for it.
        rounds: Times that each case is run.
    """
    every = {"": (Case("", 1.0), plain)} | {str(number): other for number, other in enumerate(others)}
    times = timed(
        {
            name: partial(model, **batch.to(model.device, model.dtype), use_cache=True, logits_to_keep=1)
            for name, (_, batch) in every.items()
        },
        device=str(model.device),
        rounds=rounds,
        around=lambda name: every[name][0].put_on(model, processor),
    )
    return [ratio(times[name], times[""]) for name in every if name]


@torch.inference_mode()
def kept_patches(model: LlavaForConditionalGeneration, case: Case, batch: BatchFeature) -> list[list[int]]:
    """Which patches of each single-image prompt a case keeps, as positions in the patch grid."""
    with vltok.apply(model, case.method) as handle:
        model(**batch.to(model.device, model.dtype), use_cache=True, logits_to_keep=1)
        return [images[0].tolist() for images in handle.report(file=None).keep_indices]
