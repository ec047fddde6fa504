"""One engine of vLLM in a process of its own: it answers questions, and is timed under so many requests at once.

These functions run in the process of a case, in which nothing else runs; the engine stays in it between calls.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eval.canvas.data import Canvases
from vltok.serving import vllm_overrides
from vltok.serving.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Settings:
    """How an engine is started and asked.

    Attributes:
        model: Folder of the model.
        method: What prunes it, as text, or None.
        has_weights: Whether the folder has weights; random ones are made up else.
        dtype: As vLLM names it.
        text_tokens: Words behind an image, at least.
        new_tokens: Tokens of an answer.
        memory: Share of a GPU that the engine may take.
    """

    model: str
    method: str | None
    has_weights: bool = True
    dtype: str = "float32"
    text_tokens: int = 40
    new_tokens: int = 16
    memory: float = 0.9


@dataclass(frozen=True)
class Load:
    """What an engine did under so many requests at once.

    Attributes:
        concurrency: Requests in the engine at a time; a new one comes when one is answered.
        requests: Requests answered.
        seconds: From the first request to the last answer.
        first_token: Median of the time from a request to its first token, its image's preprocessing included.
        prompt_tokens: Tokens of a prompt, on average.
        kv_blocks: The most blocks of the KV cache in use at a time, as vLLM's block pool counts them.
        encoder_seconds: Time in the encoder, pruning included.
        steps: Steps of the engine.
    """

    concurrency: int
    requests: int
    seconds: float
    first_token: float
    prompt_tokens: float
    kv_blocks: int
    encoder_seconds: float
    steps: int

    @property
    def per_second(self) -> float:
        """Requests answered in a second."""
        return self.requests / self.seconds


class Engine:
    """The offline engine on a model, with pruning or without."""

    def __init__(self, settings: Settings, most: int) -> None:
        import vllm
        from vllm.platforms import current_platform

        self.settings, self.numbers = settings, count()
        folder = Path(settings.model)
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        plain = {"architectures": [ARCHITECTURES[kind].name]}  # the same class, with nothing configured
        self.is_cpu = current_platform.is_cpu()
        self.llm: Any = vllm.LLM(
            settings.model,
            dtype=settings.dtype,
            load_format="auto" if settings.has_weights else "dummy",
            hf_overrides=plain if settings.method is None else vllm_overrides(folder, settings.method),
            max_num_seqs=most,
            limit_mm_per_prompt={"image": 1},
            gpu_memory_utilization=settings.memory,
            enforce_eager=self.is_cpu,
            enable_prefix_caching=False,  # each image is seen for the first time
            mm_processor_cache_gb=0,
            seed=0,
            **({"block_size": 32, "distributed_executor_backend": "uni"} if self.is_cpu else {}),
        )
        self.clock: Callable[[], float] = time.perf_counter
        if self.is_cpu and torch.get_num_threads() == 1:
            self.clock = time.process_time  # other programs on the machine don't count
        self.encoder_seconds = 0.0
        self.llm.apply_model(self._time_encoder)

    def _time_encoder(self, model: Any) -> None:
        encode = model.embed_multimodal

        def timed(**kwargs: Any) -> Any:
            start = self._now()
            encoded = encode(**kwargs)
            self.encoder_seconds += self._now() - start
            return encoded

        model.embed_multimodal = timed

    def _now(self) -> float:
        if not self.is_cpu:
            torch.cuda.synchronize()
        return self.clock()

    def blocks_used(self) -> int:
        """Blocks of the KV cache that requests hold now."""
        pool = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is never used

    def about(self) -> dict[str, Any]:
        """What the scheduler may do in a step."""
        scheduler = self.llm.llm_engine.vllm_config.scheduler_config
        names = ("max_num_batched_tokens", "max_num_encoder_input_tokens", "max_num_seqs")
        return {name: getattr(scheduler, name) for name in names}

    def run(self, concurrency: int, requests: int, prompt: str) -> Load:
        """Answer requests about different images, so many at a time."""
        import vllm

        canvases = Canvases("test")
        asked = [self._request(prompt, canvases, next(self.numbers)) for _ in range(requests)]
        length = self.settings.new_tokens
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
        )
        engine, waiting = self.llm.llm_engine, iter(enumerate(asked))
        came, first, prompts, blocks, steps = {}, {}, [], 0, 0
        self.encoder_seconds, start = 0.0, self._now()

        def add() -> None:
            number, request = next(waiting, (None, None))
            if request is not None:
                came[str(number)] = self._now()
                engine.add_request(str(number), request, sampling)

        for _ in range(concurrency):
            add()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps += 1
            blocks = max(blocks, self.blocks_used())
            for output in outputs:
                first.setdefault(output.request_id, self._now() - came[output.request_id])
                if output.finished:
                    prompts.append(len(output.prompt_token_ids))
                    add()
        return Load(
            concurrency=concurrency,
            requests=requests,
            seconds=self._now() - start,
            first_token=statistics.median(first.values()),
            prompt_tokens=statistics.fmean(prompts),
            kv_blocks=blocks,
            encoder_seconds=self.encoder_seconds,
            steps=steps,
        )

    def _request(self, prompt: str, canvases: Canvases, index: int) -> dict[str, Any]:
        words = canvases.questions(index)[0].text.split()
        words = words * -(-self.settings.text_tokens // len(words))
        return {"prompt": prompt.format(" ".join(words)), "multi_modal_data": {"image": picture(canvases, index)}}

    def right(self, questions: int) -> int:
        """How many canvas questions are answered rightly with one word, of so many."""
        import vllm

        canvases, asked = Canvases("test"), []
        for index in count():
            asked += canvases.questions(index)
            if len(asked) >= questions:
                break
        requests = [
            {
                "prompt": f"<image> {question.text}",
                "multi_modal_data": {"image": picture(canvases, question.canvas)},
            }
            for question in asked[:questions]
        ]
        outputs = self.llm.generate(requests, vllm.SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        pairs = zip(asked, outputs, strict=False)
        return sum(output.outputs[0].text.strip() == question.answer for question, output in pairs)


@contextmanager
def engine_for(settings: Settings, most: int) -> Iterator[Engine]:
    """An engine that is gone behind the block, so that another one can be started."""
    import vllm

    held = [Engine(settings, most)]
    try:
        yield held[0]
    finally:
        held.pop().llm = None
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


def accuracy(settings: Settings, questions: int) -> float:
    """The share of canvas questions that a model answers rightly, 0..1."""
    with engine_for(settings, 32) as engine:
        return engine.right(questions) / questions


_running: list[Engine] = []


def start(settings: Settings, most: int) -> dict[str, Any]:
    """Start the engine that `load` asks, and answer a request to warm up."""
    _running.append(Engine(settings, most))
    _running[0].run(1, 1, prompt_of(settings))
    return _running[0].about()


def load(concurrency: int, requests: int) -> Load:
    """Time the engine of this process."""
    return _running[0].run(concurrency, requests, prompt_of(_running[0].settings))


def prompt_of(settings: Settings) -> str:
    """A prompt with an image and a place for words, as the model's chat template writes it if it has one."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(settings.model, local_files_only=True)
    if not processor.chat_template:
        return "<image> {}"
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "WORDS"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return text.replace("{", "{{").replace("}", "}}").replace("WORDS", "{}")


def picture(canvases: Canvases, index: int) -> Image.Image:
    """The image of a canvas."""
    return Image.fromarray(canvases.canvas(index).image)
