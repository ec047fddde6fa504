"""Every model with every method answers as vltok on transformers does."""

from __future__ import annotations

import pytest
from serving.noting import noting
from serving.vllm.serving import NAMES, check_agrees, engine, generate, golden, request

CASES = [(name, method) for name in NAMES for method in golden(name)["results"]]


@pytest.mark.parametrize(("name", "method"), CASES, ids=[f"{name}-{method or 'none'}" for name, method in CASES])
def test_tokens_that_are_kept_and_answers_are_those_of_transformers(name, method):
    found = golden(name)
    expected = found["results"][method]
    unlike = {int(number) for number in found["unlike"]}
    picked: dict[str, list[int]] = {}
    asked = [request(name, each) for each in found["requests"]]
    with noting(picked), engine(name, method or None) as llm:
        rows = generate(llm, asked)
        least = (
            generate(llm, [request(name, each, visual_num_keep=1) for each in found["requests"][:3]]) if method else []
        )
    kept = {key: picked.get(key) for key in expected["picked"]}
    assert kept == expected["picked"]
    alike = [number for number in range(len(rows)) if number not in unlike]
    check_agrees(
        [rows[number] for number in alike], [expected["rows"][number] for number in alike], f"{name}, {method}"
    )
    whole = [row["prompt"] for row in found["results"][""]["rows"]]
    written = [row["prompt"] for row in rows]
    if method:
        assert sum(written) < sum(whole)
        assert all(row["prompt"] <= own for row, own in zip(least, written, strict=False))
    else:
        assert [written[number] for number in alike] == [whole[number] for number in alike]
