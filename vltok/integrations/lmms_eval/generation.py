"""What a task asks of generate(), and where its answers end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lmms_eval.api.instance import Instance
from loguru import logger
from transformers import GenerationConfig

# What tasks tell certain models, or lmms-eval itself, besides what generate() takes.
_NOT_OURS = {"until", "image_aspect_ratio"}


def by_kwargs(requests: Iterable[Instance]) -> list[tuple[dict[str, Any], list[int]]]:
    """Group requests by what they ask of generate(): that, and their numbers, the longest questions first."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    requests = list(requests)
    for number, request in enumerate(requests):
        asked = request.args[2]
        groups.setdefault(json.dumps(asked, sort_keys=True, default=str), (asked, []))[1].append(number)
    for _, numbers in groups.values():
        numbers.sort(key=lambda number: -len(requests[number].args[0]))  # little padding, and memory runs out at once
    return list(groups.values())


def generate_kwargs(asked: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The keywords of generate() for what a task asks: greedy unless it gives a temperature.

    Args:
        asked: The task's `generation_kwargs`.
        max_new_tokens: Longest answer where it says nothing of that.
    """
    known = vars(GenerationConfig())
    if unknown := sorted(asked.keys() - known.keys() - _NOT_OURS):
        logger.warning(f"generate() knows nothing of {', '.join(unknown)}, which the task asks for; left out")
    kwargs = {"max_new_tokens": max_new_tokens, **{name: asked[name] for name in asked.keys() & known.keys()}}
    kwargs["do_sample"] = float(asked.get("temperature") or 0) > 0
    if not kwargs["do_sample"]:
        kwargs |= {"temperature": None, "top_p": None, "top_k": None}
    return kwargs


def cut(answer: str, until: str | Iterable[str] | None) -> str:
    """An answer up to the first of the words that end it.

    Args:
        answer: What the model wrote.
        until: The task's `until`. Line ends don't count: lmms-eval gives those that part its examples to all tasks
            that say nothing, and a chat has no examples.
    """
    stops = [until] if isinstance(until, str) else until or ()
    for stop in filter(str.strip, stops):
        answer = answer.split(stop)[0]
    return answer
