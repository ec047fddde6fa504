"""Starts vLLM's engine in this process, and asks it what `tests/serving/golden.py` asked transformers."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from PIL import Image

from vltok.serving.architectures import ARCHITECTURES

ROOT = Path(os.environ["VLTOK_GOLDEN"])
SIZES = [(56, 56), (40, 72), (72, 40), (64, 48), (56, 28), (28, 56)]


def golden(name: str) -> dict[str, Any]:
    """The requests and results of a model."""
    return json.loads((ROOT / name / "golden.json").read_text())


@dataclass
class Engine:
    """Holds an engine as long as its block runs."""

    llm: vllm.LLM | None


@contextmanager
def engine(name: str, method: Any = None, **options: Any) -> Iterator[Engine]:
    """The offline engine on a model, with a method or none."""
    folder = ROOT / name
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    overrides = {"architectures": [ARCHITECTURES[kind].name]} | ({} if method is None else {"vltok_pruning": method})
    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 2} | ({"video": 1} if ARCHITECTURES[kind].videos else {}),
        "hf_overrides": overrides,
        "distributed_executor_backend": "uni",
        "mm_device_do_normalize": False,
        "seed": 0,
        "gpu_memory_utilization": 0.2,
    }
    held = [Engine(vllm.LLM(str(folder), **{**given, **options}))]
    try:
        yield held[0]
    finally:
        held.pop().llm = None  # it has to be gone before the next one comes
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


def frames_of(number: int) -> Any:
    """The frames of a video, as tests/serving/golden.py draws them."""
    generator = torch.Generator().manual_seed(number)
    width, height = SIZES[number % len(SIZES)]
    shape = (4 + 2 * (number % 2), height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()


def request(name: str, asked: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A request as vLLM takes it."""
    data: dict[str, Any] = {}
    if asked["images"]:
        data["image"] = [Image.open(ROOT / name / f"{number}.png") for number in asked["images"]]
    if asked.get("videos"):
        videos = [frames_of(number) for number in asked["videos"]]
        data["video"] = [
            (
                frames,
                {
                    "fps": 24.0,
                    "duration": len(frames) / 24,
                    "total_num_frames": len(frames),
                    "frames_indices": list(range(len(frames))),
                    "video_backend": "opencv",
                    "do_sample_frames": False,
                },
            )
            for frames in videos
        ]
    return {"prompt": asked["prompt"], "multi_modal_data": data} | ({"mm_processor_kwargs": options} if options else {})


def generate(engine: Engine, requests: list[dict[str, Any]], count: int = 6) -> list[dict[str, Any]]:
    """What is generated greedily: ids, their log-probabilities, and how long the prompt was."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, logprobs=0, ignore_eos=True)
    rows = []
    for output in engine.llm.generate(requests, sampling, use_tqdm=False):
        ids = list(output.outputs[0].token_ids)
        scores = [each[own].logprob for each, own in zip(output.outputs[0].logprobs, ids, strict=True)]
        rows.append({"ids": ids, "scores": scores, "prompt": len(output.prompt_token_ids)})
    return rows
