"""In bfloat16 positions stay whole numbers, and most answers those of float32."""

from __future__ import annotations

import pytest
from serving.noting import noting
from serving.vllm.serving import BOTH, engine, generate, golden, request

from vltok.serving.positions import fill_in
from vltok.serving.vllm import model

METHOD = "stride,keep_ratio=0.25,regions=(2,2)"  # its choice hangs on no number


def batched(row: list[int], count: int) -> list[list[int]]:
    """A row in parts of so many."""
    return [row[begin : begin + count] for begin in range(0, len(row), count)]


@pytest.mark.parametrize("name", BOTH)
def test_answers_in_bfloat16_are_mostly_those_in_float32(name, monkeypatch):
    found = golden(name)
    expected = found["results"][METHOD]["rows"]
    numbers, picked = [], {}

    def noted(positions, slots, own):
        numbers.append(own)
        return fill_in(positions, slots, own)

    monkeypatch.setattr(model, "fill_in", noted)
    with noting(picked), engine(name, METHOD, dtype="bfloat16") as llm:
        rows = generate(llm, [request(name, each) for each in found["requests"]])
    first = [row["ids"][0] == own["ids"][0] for row, own in zip(rows, expected, strict=True)]
    assert sum(first) >= 2 / 3 * len(first)
    filled = [own[0].tolist() for own in numbers if own.shape[1]]
    assert filled
    if name == BOTH[0]:  # its positions are the places of the tokens
        places = {tuple(row) for row in picked.values()}
        assert all(tuple(part) in places for row in filled for part in batched(row, len(next(iter(places)))))
