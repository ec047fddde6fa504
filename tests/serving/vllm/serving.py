"""Starts vLLM's engine in this process, and asks it what `tests/serving/golden.py` asked transformers."""

from __future__ import annotations

import gc
import json
import os
import warnings
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


NAMES = sorted(each.parent.name for each in ROOT.glob("*/golden.json"))
if not NAMES:
    raise FileNotFoundError(f"{ROOT} has no models; write them with tests/serving/golden.py")
EXACT = 1e-4  # of log-probabilities; tokens that are nearer than this to each other may change places


def golden(name: str) -> dict[str, Any]:
    """The requests and results of a model, and which kind it is."""
    kind = json.loads((ROOT / name / "config.json").read_text())["model_type"]
    return {"kind": kind, **json.loads((ROOT / name / "golden.json").read_text())}


# A model with positions on one axis, and one whose images have several: those with the most methods.
BOTH = [
    max(
        (name for name in NAMES if ARCHITECTURES[golden(name)["kind"]].has_axes is has),
        key=lambda name: len(golden(name)["results"]),
    )
    for has in (False, True)
]


@dataclass
class Engine:
    """Holds an engine as long as its block runs."""

    llm: vllm.LLM | None


def arguments(name: str, method: Any = None, **options: Any) -> dict[str, Any]:
    """What an engine takes for a model, with a method or none; `hf_overrides` add to these."""
    kind = golden(name)["kind"]
    overrides = {"architectures": [ARCHITECTURES[kind].name]} | ({} if method is None else {"vltok_pruning": method})
    return {
        "model": str(ROOT / name),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 2} | ({"video": 1} if ARCHITECTURES[kind].videos else {}),
        "distributed_executor_backend": "uni",
        "mm_device_do_normalize": False,
        "seed": 0,
        "gpu_memory_utilization": 0.2,
        "num_gpu_blocks_override": 64,  # else it fills a whole gigabyte with zeros
        **options,
        "hf_overrides": {**overrides, **options.get("hf_overrides", {})},
    }


@contextmanager
def engine(name: str, method: Any = None, **options: Any) -> Iterator[Engine]:
    """The offline engine on a model, with a method or none."""
    gc.freeze()  # vLLM collects garbage nine times, among all that was ever imported
    held = [Engine(vllm.LLM(**arguments(name, method, **options)))]
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
    """What is generated greedily: ids, their log-probabilities and those of others, and how long the prompt was."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, logprobs=4, ignore_eos=True)
    rows = []
    for output in engine.llm.generate(requests, sampling, use_tqdm=False):
        ids = list(output.outputs[0].token_ids)
        others = [{key: value.logprob for key, value in each.items()} for each in output.outputs[0].logprobs]
        scores = [each[own] for each, own in zip(others, ids, strict=True)]
        rows.append({"ids": ids, "scores": scores, "others": others, "prompt": len(output.prompt_token_ids)})
    return rows


def check_agrees(rows: list[dict[str, Any]], expected: list[dict[str, Any]], where: str) -> None:
    """Fail where answers differ: in a token, unless two are equally likely, which is said; or a log-probability."""
    assert len(rows) == len(expected)
    for number, (row, own) in enumerate(zip(rows, expected, strict=True)):
        for place, (token, wanted) in enumerate(zip(row["ids"], own["ids"], strict=True)):
            apart = abs(row["scores"][place] - own["scores"][place])
            assert apart < EXACT, f"{where}, request {number}, token {place}: log-probabilities differ by {apart:.1e}"
            if token != wanted:
                behind = row["scores"][place] - row["others"][place].get(wanted, -torch.inf)
                assert behind < EXACT, f"{where}, request {number}: {row['ids']} instead of {own['ids']}"
                warnings.warn(
                    f"{where}, request {number}: tokens {token} and {wanted} are equally likely", stacklevel=2
                )
                break


def counted(engine: Engine, name: str) -> int:
    """A counter of vLLM's, by the name that it has in its metrics."""
    return sum(each.value for each in engine.llm.get_metrics() if each.name == name)
