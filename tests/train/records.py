"""Conversations in LLaVA's form, for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def record(name: str, images: Sequence[Any], *turns: str) -> dict[str, Any]:
    """A conversation; turns are questions and answers in turn."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "conversations": conversations, **({"image": list(images)} if images else {})}


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
