"""Usage: how many visual tokens a request had, and what was left of them and of their cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vltok.engine.cache import bytes_held
from vltok.engine.names import CACHE
from vltok.report import Report


@dataclass(frozen=True)
class Usage:
    """What the prompt of a request cost.

    Attributes:
        task: The task's name.
        doc_id: Number of the request's document in the task.
        visual_tokens: Visual tokens of all its images and videos, before any method.
        kept_tokens: How many of them enter the language model.
        tokens_per_layer: Tokens of the prompt that enter a decoder layer, mean over the layers, padding excluded.
        kv_bytes: Bytes of all keys and values after the prompt: an equal share of those of its batch, whose shorter
            prompts are filled up. 0 where the model keeps no cache.
    """

    task: str
    doc_id: int
    visual_tokens: int
    kept_tokens: int
    tokens_per_layer: float
    kv_bytes: int


class Meter:
    """Reads off the cache that a model makes of a prompt, in a block.

    with Meter(model) as meter:
        model.generate(**inputs)
    meter.kv_bytes
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kv_bytes: int | None = None

    def _see(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.kv_bytes is None:  # later calls are about words of the answer
            self.kv_bytes = bytes_held(getattr(output, CACHE, None))

    def __enter__(self) -> Meter:
        self._hook = self.model.register_forward_hook(self._see)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hook.remove()


def usages(
    names: list[tuple[str, int]],
    inputs: Mapping[str, torch.Tensor],
    marks: Mapping[str, int],
    report: Report | None,
    kv_bytes: int,
) -> list[Usage]:
    """What each prompt of a batch cost.

    Args:
        names: Task and document of each.
        inputs: What the processor made of them.
        marks: The ids that stand for visual tokens, by kind.
        report: That of the methods on the model, or None where there are none.
        kv_bytes: Bytes of the cache after the prompts.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    placeholders = sum((ids == mark).sum(1) for mark in marks.values()).tolist()
    tokens, found = mask.sum(1).tolist(), []
    for row, (task, doc_id) in enumerate(names):
        visual = kept = placeholders[row]
        entering = float(tokens[row])
        if report is not None and report.visual_tokens:
            beam = row * len(report.visual_tokens) // len(names)  # beams of a prompt stand together
            kept = sum(report.kept_tokens[beam])
            entering = report.tokens_per_layer[beam].float().mean().item()
        if report is not None and report.condensed is not None:
            visual = visual * report.condensed.patches // report.condensed.tokens
        found.append(Usage(task, doc_id, visual, kept, entering, kv_bytes // len(names)))
    return found
