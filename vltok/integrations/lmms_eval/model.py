"""The models that lmms-eval runs: one class for all families, and names with the defaults of lmms-eval's own models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vltok import families
from vltok.api import apply
from vltok.handle import Handle
from vltok.integrations.lmms_eval.generation import by_kwargs, cut, generate_kwargs
from vltok.integrations.lmms_eval.prompts import Prompter, Sample
from vltok.integrations.lmms_eval.settings import Settings
from vltok.integrations.lmms_eval.usage import Meter, Usage, usages
from vltok.serialization import load


class Vltok(lmms):
    """A vision-language model of any family of vltok, with a method on it or as it is.

    Args:
        given: The arguments, see `Settings`.

    Attributes:
        settings: What was given, with defaults.
        processor: The model's processor.
        handle: The methods on the model, None where there are none.
        usage: What each request cost that was answered, in the order of the requests.

    Raises:
        CheckpointError: If a method, or a setting of it, is unknown; before anything is loaded, as for the next two.
        TypeError: If an argument is unknown, or `pretrained` is missing.
        ValueError: If a value is out of range.
        UnsupportedModelError: If the model belongs to no family of vltok, or lacks what the method needs.
    """

    is_simple = False
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.settings = settings = Settings.read(type(self).__name__, self.defaults, given)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        hub = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        self.processor = _processor(settings, hub)
        self._model = AutoModelForImageTextToText.from_pretrained(
            settings.pretrained,
            dtype=settings.dtype,
            device_map=settings.device_map or str(self._own_device()),
            attn_implementation=settings.attn_implementation,
            **hub,
        ).eval()
        view = families.view(self._model)
        self._marks = view.family.marks(view.host)
        self.handle = self._attach()
        self.usage: list[Usage] = []
        self._prompter = Prompter(self.processor, settings)

    def _own_device(self) -> torch.device:
        if self._world_size > 1:
            return self.accelerator.device
        return torch.device(self.settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _attach(self) -> Handle | None:
        if self.settings.saved is not None:
            return load(self._model, self.settings.saved, processor=self.processor)
        if self.settings.method is not None:
            return apply(self._model, self.settings.method, processor=self.processor)
        return None

    @property
    def model(self) -> Any:
        """The model that answers."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self._model.device

    @property
    def batch_size(self) -> int:
        """Prompts that are answered together."""
        return self.settings.batch_size

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer the requests of lmms-eval's tasks.

        Raises:
            RuntimeError: If one can't be answered. It names the tasks and documents.
        """
        results: dict[int, GenerationResult] = {}
        spent: dict[int, Usage] = {}
        seconds = 0.0
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for asked, numbers in by_kwargs(requests):
                kwargs = generate_kwargs(asked, self.settings.max_new_tokens)
                for begin in range(0, len(numbers), self.batch_size):
                    chunk = [(number, requests[number]) for number in numbers[begin : begin + self.batch_size]]
                    for samples in self._batches(chunk):
                        began = time.perf_counter()
                        answers, used = self._answer(samples, kwargs)
                        seconds += time.perf_counter() - began
                        for sample, (text, counts), each in zip(samples, answers, used, strict=True):
                            results[sample.number] = GenerationResult(cut(text, asked.get("until")), counts)
                            spent[sample.number] = each
                        bar.update(len(samples))
        own = [spent[k] for k, each in enumerate(requests) if not (each.metadata or {}).get("__padding_only__")]
        self.usage += own
        self._log([results[number] for number in range(len(requests))], own, seconds)
        return [results[number] for number in range(len(requests))]

    def _batches(self, chunk: Sequence[tuple[int, Instance]]) -> Iterator[list[Sample]]:
        """Prompts of a chunk that a processor takes together."""
        samples = []
        for number, request in chunk:
            _, doc_to_messages, _, doc_id, task, split = request.args
            sample = Sample(number, task, doc_id)
            with _named([sample]):
                self._prompter.fill(sample, doc_to_messages(self.task_dict[task][split][doc_id]))
            samples.append(sample)
        samples.sort(key=lambda sample: sample.kinds)
        for _, batch in groupby(samples, key=lambda sample: sample.kinds):
            yield list(batch)

    def _answer(
        self, samples: list[Sample], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[str, TokenCounts]], list[Usage]]:
        """Answers to a batch, and what it cost."""
        tokenizer = self.processor.tokenizer
        with _named(samples):
            inputs = self._prompter.inputs(samples).to(self.device, self._model.dtype)
            with Meter(self._model) as meter:
                tokens = self._model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **kwargs)
            report = None if self.handle is None else self.handle.report(file=None)
            names = [(sample.task, sample.doc_id) for sample in samples]
            used = usages(names, inputs, self._marks, report, meter.kv_bytes)
            written = tokens[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        read = inputs["attention_mask"].sum(1).tolist()
        lengths = (written != tokenizer.pad_token_id).sum(1).tolist()
        return [(text, TokenCounts(*counts)) for text, *counts in zip(texts, read, lengths, strict=True)], used

    def _log(self, results: Sequence[GenerationResult], used: Sequence[Usage], seconds: float) -> None:
        """Let lmms-eval write down speed and mean usage, as "throughput" of its results."""
        written = sum(result.token_counts.output_tokens for result in results)
        numbers = [{k: v for k, v in asdict(each).items() if k not in ("task", "doc_id")} for each in used]
        means = {name: sum(each[name] for each in numbers) / len(numbers) for name in (numbers[0] if numbers else ())}
        log_metrics(seconds, written, written / seconds if seconds else 0.0, means)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: lmms-eval asks chat models for answers only."""
        raise NotImplementedError(f"{type(self).__name__} answers and rates no given answers; choose generation tasks")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there."""
        raise NotImplementedError(f"{type(self).__name__} answers single questions; choose tasks of one round")

    def clean(self) -> None:
        """Let go of the model; lmms-eval calls it when everything is answered."""
        self.handle = None
        super().clean()


class VltokLlava(Vltok):
    """LLaVA-1.5 and its relatives, with the defaults of lmms-eval's `llava_hf`."""

    defaults: ClassVar[dict[str, Any]] = {"pretrained": "llava-hf/llava-1.5-7b-hf"}


class VltokQwen2_5_VL(Vltok):  # noqa: N801 as lmms-eval writes it
    """Qwen2.5-VL, with the defaults of lmms-eval's `qwen2_5_vl`."""

    defaults: ClassVar[dict[str, Any]] = {
        "pretrained": "Qwen/Qwen2.5-VL-3B-Instruct",
        "dtype": "bfloat16",
        "min_pixels": 256 * 28 * 28,
        "max_pixels": 1605632,
        "max_new_tokens": 128,
    }


class VltokQwen3_VL(Vltok):  # noqa: N801 as lmms-eval writes it
    """Qwen3-VL, with the defaults of lmms-eval's `qwen3_vl`."""

    defaults: ClassVar[dict[str, Any]] = {
        "pretrained": "Qwen/Qwen3-VL-4B-Instruct",
        "dtype": "bfloat16",
        "min_pixels": 4 * 32 * 32,  # it names others, and uses them for videos alone
        "max_pixels": 16384 * 32 * 32,
        "max_new_tokens": 128,
        "system_prompt": "You are a helpful assistant.",
    }


class VltokInternVL(Vltok):
    """InternVL in transformers' format, with the defaults of lmms-eval's `internvl_hf`."""

    defaults: ClassVar[dict[str, Any]] = {
        "pretrained": "OpenGVLab/InternVL3_5-8B-HF",
        "dtype": "bfloat16",
        "max_patches": 12,
    }


def _processor(settings: Settings, hub: dict[str, Any]) -> Any:
    """The processor of a model, which pads with what it has, and takes images of the sizes that were asked for."""
    names = ("min_pixels", "max_pixels", "max_patches")
    sizes = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    processor = AutoProcessor.from_pretrained(settings.pretrained, **hub, **sizes)
    images = processor.image_processor
    edges = getattr(images, "size", None) or {}
    own = {"min_pixels": edges.get("shortest_edge"), "max_pixels": edges.get("longest_edge")}
    own["max_patches"] = getattr(images, "max_patches", None)
    for name, value in sizes.items():
        if own[name] != value:
            raise ValueError(f"{type(images).__name__} has no {name}, got {name}={value}; leave it out")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


@contextmanager
def _named(samples: Sequence[Sample]) -> Iterator[None]:
    """Say of an error which requests it is about."""
    try:
        yield
    except Exception as error:
        names = ", ".join(f"document {sample.doc_id} of task {sample.task}" for sample in samples)
        raise RuntimeError(f"no answer to {names}: {type(error).__name__}: {error}") from error
