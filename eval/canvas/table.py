"""Canvas VQA results as one table, as JSON and as CSV."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from eval.canvas.data import KINDS
from eval.canvas.runner import Result


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
        row: dict[str, object] = {"method": result.case.name, "keep_ratio": result.case.keep_ratio}
        for kind in KINDS:
            base = reference.accuracy(kind)
            row |= accuracy_of(result, kind)
            row[f"{kind}_of_unpruned"] = number(result.accuracy(kind) / base if base else math.nan)
        row["visual_tokens"] = number(result.visual_tokens / result.total)
        row["tokens_per_layer"] = number(result.layer_tokens / result.total)
        row["kv_bytes"] = number(result.kv_bytes / result.total)
        shares = [record.alpha_tv for record in result.relevance]
        row["stage2_text_to_visual"] = number(sum(shares) / len(shares) if shares else math.nan)
        row["stage2_dropped"] = sum(record.dropped for record in result.relevance) if shares else None
        row["prefill_ratio"] = number(result.prefill_ratio)
        rows.append(row)
    return rows


def accuracy_of(result: Result, kind: str) -> dict[str, object]:
    """How many questions of a kind were asked, the share of right answers, and its 95 % interval."""
    low, high = wilson(result.hits[kind], result.asked[kind])
    shares = {"accuracy": result.accuracy(kind), "low": low, "high": high}
    return {f"{kind}_questions": result.asked[kind]} | {f"{kind}_{name}": number(each) for name, each in shares.items()}


def write(rows: Sequence[dict[str, object]], settings: dict[str, object], folder: Path, name: str = "results") -> None:
    """Write NAME.json (settings and rows) and NAME.csv (rows)."""
    (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "results": list(rows)}, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def render(rows: Sequence[dict[str, object]]) -> Table:
    """The table for people: accuracy in % with its 95 % interval, beside it the share of the unpruned accuracy."""
    asked = ", ".join(f"{rows[0][f'{kind}_questions']} {kind}" for kind in KINDS)
    table = Table(
        title=f"Canvas VQA, test split: accuracy in % (95 % interval), share of the unpruned. Questions: {asked}",
        caption="tokens, KV cache: mean per question; tokens/layer counts text, mean over layers; "
        "prefill: time as a ratio to unpruned, picture encoding included. Fewer pixels (vltok.resize) are no row, as "
        "this model's resolution is fixed",
    )
    table.add_column("keep", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for kind in KINDS:
        table.add_column(kind, justify="right", no_wrap=True)
        table.add_column("of full", justify="right", no_wrap=True)
    for name in ("visual\ntokens", "tokens\n/layer", "KV\nKiB", "prefill"):
        table.add_column(name, justify="right", no_wrap=True)
    for k, row in enumerate(rows):
        cells = [f"{100 * row['keep_ratio']:g} %", str(row["method"])]
        for kind in KINDS:
            low, high = row[f"{kind}_low"], row[f"{kind}_high"]
            cells.append(
                "-" if low is None else f"{100 * row[f'{kind}_accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"
            )
            share = row[f"{kind}_of_unpruned"]
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        cells += [f"{row['visual_tokens']:.0f}", f"{row['tokens_per_layer']:.0f}", f"{row['kv_bytes'] / 1024:.0f}"]
        cells.append("-" if row["prefill_ratio"] is None else f"{row['prefill_ratio']:.2f}x")
        last = k + 1 == len(rows) or rows[k + 1]["keep_ratio"] != row["keep_ratio"]
        table.add_row(*cells, end_section=last)
    return table


def stage2_note(rows: Sequence[dict[str, object]]) -> str:
    """What ToDRE's second stage did, in a sentence; empty where it did not run."""
    looked = [row for row in rows if row["stage2_dropped"] is not None]
    if not looked:
        return ""
    low, high = (pick(row["stage2_text_to_visual"] for row in looked) for pick in (min, max))
    dropped = sum(row["stage2_dropped"] for row in looked)
    asked = sum(row[f"{kind}_questions"] for row in looked for kind in KINDS)
    return (
        f"ToDRE's stage 2 dropped the visual tokens of {dropped} of {asked} prompts: where it looks, the text still "
        f"gives {100 * low:.0f} to {100 * high:.0f} % of its attention to them (mean per keep ratio)."
    )


def number(value: float) -> float | None:
    """Six significant digits; None for NaN, which JSON does not know."""
    return None if math.isnan(value) else float(f"{value:.6g}")
