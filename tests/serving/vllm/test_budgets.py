"""Requests with budgets of their own in one batch, and the caches between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving.vllm.serving import NAMES, Engine, check_agrees, counted, engine, generate, golden, request

HITS = "vllm:prefix_cache_hits"
IMAGES = "vllm:mm_cache_hits"


@pytest.fixture(scope="module", params=NAMES)
def served(request) -> Iterator[tuple[str, Engine]]:
    """A model that keeps a quarter of its visual tokens, and up to all on request."""
    method = {"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 1.0}
    caches = {"block_size": 32, "enable_prefix_caching": True, "disable_log_stats": False}
    with engine(request.param, method, **caches) as llm:
        yield request.param, llm


def asked(name: str, ratio: str, own: str | None = None) -> list[dict[str, Any]]:
    """The long requests with a budget; None asks for the server's."""
    options = {} if own is None else {"visual_keep_ratio": float(own)}
    return [request(name, each, **options) for each in golden(name)["long"]]


def test_budgets_in_one_batch_asked_back_and_forth_are_answered_as_alone(served):
    name, llm = served
    ratios = golden(name)["ratios"]
    order = [*ratios, *reversed(ratios)]
    lengths = {}
    for _ in range(2):
        batch = [each for ratio in order for each in asked(name, ratio, ratio)]
        rows = generate(llm, batch)
        count = len(golden(name)["long"])
        for number, ratio in enumerate(order):
            own = rows[number * count : (number + 1) * count]
            check_agrees(own, ratios[ratio], f"{name} at {ratio}")
            lengths[ratio] = sum(row["prompt"] for row in own)
    assert [lengths[ratio] for ratio in ratios] == sorted(set(lengths.values()))  # more is kept at a larger ratio


def test_budgets_one_after_the_other_come_from_the_caches(served):
    name, llm = served
    ratios = golden(name)["ratios"]
    for _ in range(2):
        before, images = counted(llm, HITS), counted(llm, IMAGES)
        for ratio in ratios:
            check_agrees(generate(llm, asked(name, ratio, ratio)), ratios[ratio], f"{name} at {ratio}")
    assert counted(llm, HITS) > before
    assert counted(llm, IMAGES) > images


def test_a_request_without_a_budget_has_that_of_the_server(served):
    name, llm = served
    check_agrees(generate(llm, asked(name, "0.25")), golden(name)["ratios"]["0.25"], name)
