"""Published results beside own ones, with what was done differently.

The figures are in published.json, each with its source: shares of the unpruned score in %, or scores beside the
unpruned one. A figure is of its own sets, prompts and versions: one that is within 1.5 points of the own share is as
near as papers are to each other.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.plan import Row
from eval.benchmarks.results import MEAN, Record
from eval.benchmarks.table import percent
from eval.tables import Table

PUBLISHED = Path(__file__).with_name("published.json")
NEAR = 0.15  # budgets that differ by a larger part are not set beside each other


def read_published(path: Path = PUBLISHED) -> list[dict[str, Any]]:
    """All published figures: "method" as vltok names it, "model", "budget" in words and as "keep_ratio", "task",
    "number" and "unpruned" in the same unit, "positions" of kept tokens where known, "protocol", "source"."""
    return json.loads(path.read_text(encoding="utf-8"))


def compare(
    published: Sequence[Mapping[str, Any]], rows: Sequence[Row], records: Sequence[Record], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Set each published figure of the model beside the own row that is nearest in budget.

    Args:
        published: As `read_published` gives them.
        rows: What was run.
        records: What `summarise` made of it.
        facts: "model", in whose name that of the published one is looked for; "dtype"; "limit", samples or None.

    Returns:
        The published figures of methods that were run at a budget near theirs, each with "share" (published, of
        unpruned), "own" (the own share, None where there is none), its "interval", "own_keep_ratio" and "differs",
        a list of sentences.
    """
    found = []
    by_key = {(record["method"], record["keep_ratio"], record["task"]): record for record in records}
    columns = list(dict.fromkeys(record["task"] for record in records if record["task"] != MEAN))
    for figure in published:
        same = [row for row in rows if row.method is not None and row.method.name == figure["method"]]
        near = [row for row in same if abs((row.keep_ratio or 0) / figure["keep_ratio"] - 1) <= NEAR]
        if figure["model"] not in str(facts["model"]).lower() or not near:
            continue
        closest = min(abs(row.keep_ratio - figure["keep_ratio"]) for row in near)
        for row in near:  # the same method with several settings
            record = by_key.get((row.name, row.keep_ratio, figure["task"]))
            if record is None or abs(row.keep_ratio - figure["keep_ratio"]) != closest:
                continue
            found.append(
                {
                    **figure,
                    "row": row.name,
                    "share": figure["number"] / figure["unpruned"],
                    "own": record["share"],
                    "interval": (record["low"], record["high"]),
                    "own_keep_ratio": row.keep_ratio,
                    "differs": _differences(figure, row, record, columns, facts),
                }
            )
    return found


def _differences(
    figure: Mapping[str, Any], row: Row, record: Record, columns: Sequence[str], facts: Mapping[str, Any]
) -> list[str]:
    """What is known to be done differently here."""
    differs = [f"sets: {figure['protocol']}; here {', '.join(columns)}"] if figure["task"] == MEAN else []
    if figure["task"] != MEAN:
        differs.append(f"there: {figure['protocol']}")
    positions = getattr(row.method, "positions", None)
    if figure["positions"] is not None and positions != figure["positions"]:
        differs.append(f"positions of kept tokens: there {figure['positions']}, here {positions}")
    kept = record["kept_tokens"] / record["visual_tokens"] if record["visual_tokens"] else 0.0
    if abs(kept - figure["keep_ratio"]) > 0.02 * figure["keep_ratio"]:
        differs.append(f"tokens: there {figure['budget']}, here {100 * kept:.1f} % ({record['kept_tokens']:.0f})")
    differs.append(f"tokens per decoder layer here, text included: {record['tokens_per_layer']:.0f}")
    differs.append(f"dtype: here {facts['dtype']}, tokens compared in float32; there not stated")
    differs += [f"here only {facts['limit']} samples of a task"] if facts["limit"] is not None else []
    return differs


def render(comparison: Sequence[Mapping[str, Any]]) -> Table:
    """The published and own shares as a table; what differs is below it, said once for all rows that share it."""
    said: dict[str, int] = {}
    table = Table(
        ["method", "budget there", "here", "task", "published", "own", "differs", "source"],
        title="Share of the unpruned score, published and own, %",
        left=2,
    )
    for each in comparison:
        numbers = [said.setdefault(sentence, len(said) + 1) for sentence in each["differs"]]
        table.add(
            each["row"],
            each["budget"],
            f"{100 * each['own_keep_ratio']:g} %",
            each["task"],
            f"{100 * each['share']:.1f}",
            percent(each["own"], *each["interval"]),
            ", ".join(map(str, numbers)),
            each["source"],
        )
    table.notes = [f"{number}: {sentence}" for sentence, number in said.items()]
    return table
