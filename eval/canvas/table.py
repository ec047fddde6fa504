"""Canvas VQA results as one table, as JSON and as CSV."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.canvas.data import KINDS
from eval.canvas.runner import SCORES, Result
from eval.tables import Table, write_json

TITLES = {"box_iou": "box, IoU"}  # of scores that are not called what their kind is


def wilson(hits: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score, as (low, high) in 0..1; (nan, nan) where nothing was asked."""
    if asked == 0:
        return math.nan, math.nan
    z = 1.959964
    share = hits / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def records(results: Sequence[Result]) -> list[dict[str, object]]:
    """One flat record per case. Shares of the unpruned accuracy relate to the first result."""
    reference = results[0]
    rows = []
    for result in results:
        row: dict[str, object] = {"method": result.case.name, "keep_ratio": result.case.keep_ratio} | figures(result)
        for score in SCORES:
            base = reference.accuracy(score)
            row[f"{score}_of_unpruned"] = number(result.accuracy(score) / base if base else math.nan)
        shares = [record.alpha_tv for record in result.relevance]
        row["visual_tokens"] = number(result.visual_tokens / result.total)
        row["stage2_text_to_visual"] = number(sum(shares) / len(shares) if shares else math.nan)
        row["stage2_dropped"] = sum(record.dropped for record in result.relevance) if shares else None
        row["prefill_ratio"] = number(result.prefill_ratio)
        rows.append(row)
    return rows


def figures(result: Result) -> dict[str, object]:
    """Of each score how many questions were asked, the share of right answers and its 95 % interval; what it cost."""
    row: dict[str, object] = {}
    for score in SCORES:
        low, high = wilson(result.hits[score], result.asked[score])
        row[f"{score}_questions"] = result.asked[score]
        for name, value in (("accuracy", result.accuracy(score)), ("low", low), ("high", high)):
            row[f"{score}_{name}"] = number(value)
    row["accuracy"] = number(result.overall())
    row["tokens_per_layer"] = number(result.layer_tokens / result.total)
    row["kv_bytes"] = number(result.kv_bytes / result.total)
    return row


def write(rows: Sequence[dict[str, object]], settings: dict[str, object], folder: Path, name: str = "results") -> None:
    """Write NAME.json (settings and rows) and NAME.csv (rows)."""
    write_json(folder / f"{name}.json", {"settings": settings, "results": list(rows)})
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def scored(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The scores that a model got in any of the records: it is asked what it has words for."""
    return [score for score in SCORES if any(row[f"{score}_accuracy"] is not None for row in rows)]


def heads(scores: Sequence[str]) -> list[str]:
    """Heads of the columns that `cells` fills."""
    return [*(TITLES.get(score, score) for score in scores), "all"]


def cells(row: Mapping[str, object], scores: Sequence[str]) -> list[str | None]:
    """Accuracies of a record in % with their 95 % intervals, and that over all questions."""
    shown = []
    for score in scores:
        share, low, high = (row[f"{score}_{what}"] for what in ("accuracy", "low", "high"))
        shown.append(None if share is None else f"{100 * share:.1f} ({100 * low:.0f}-{100 * high:.0f})")
    return [*shown, f"{100 * row['accuracy']:.1f}"]


def asked(row: Mapping[str, object]) -> str:
    """How many questions of each kind that was asked."""
    return ", ".join(f"{count} {kind}" for kind in KINDS if (count := row[f"{kind}_questions"]))


def render(rows: Sequence[dict[str, object]]) -> Table:
    """The table for people."""
    scores = scored(rows)
    overlap = "box, IoU: half of the union of both boxes or more is common to them; "
    table = Table(
        ["keep", "method", *heads(scores), "visual\ntokens", "tokens\n/layer", "KV\nKiB", "prefill"],
        title=f"Canvas VQA, test split: accuracy in % (95 % interval). Questions: {asked(rows[0])}",
        notes=[
            f"{overlap if 'box_iou' in scores else ''}all: right answers of all questions",
            "tokens, KV cache: mean per question; tokens/layer counts text, mean over layers",
            "prefill: time as a ratio to unpruned, picture encoding included",
            "Fewer pixels (vltok.resize) are no row, as this model's resolution is fixed",
            *stage2_note(rows),
        ],
        left=2,
    )
    for k, row in enumerate(rows):
        if k and rows[k - 1]["keep_ratio"] != row["keep_ratio"]:
            table.section()
        costs = [f"{row['visual_tokens']:.0f}", f"{row['tokens_per_layer']:.0f}", f"{row['kv_bytes'] / 1024:.0f}"]
        prefill = None if row["prefill_ratio"] is None else f"{row['prefill_ratio']:.2f}x"
        table.add(f"{100 * row['keep_ratio']:g} %", row["method"], *cells(row, scores), *costs, prefill)
    return table


def stage2_note(rows: Sequence[dict[str, object]]) -> list[str]:
    """What ToDRE's second stage did, in a sentence; none where it did not run."""
    looked = [row for row in rows if row["stage2_dropped"] is not None]
    if not looked:
        return []
    low, high = (pick(row["stage2_text_to_visual"] for row in looked) for pick in (min, max))
    dropped = sum(row["stage2_dropped"] for row in looked)
    prompts = sum(row[f"{kind}_questions"] for row in looked for kind in KINDS)
    return [
        f"ToDRE's stage 2 dropped the visual tokens of {dropped} of {prompts} prompts: where it looks, the text still "
        f"gives {100 * low:.0f} to {100 * high:.0f} % of its attention to them (mean per keep ratio)."
    ]


def number(value: float) -> float | None:
    """Six significant digits; None for NaN, which JSON does not know."""
    return None if math.isnan(value) else float(f"{value:.6g}")
