"""ToDRE's second stage over depth: what it looks at after each decoder layer, and what dropping there costs and saves.

It drops all visual tokens after a layer where both the text's attention to them and theirs to the text is below tau.
One case looks after every layer and never drops (tau 0); the others drop after one layer each, at every prompt (tau 1).
After the last layer nothing is left to drop, so it is not looked at.
"""

from collections.abc import Sequence

import numpy as np

import vltok
from eval.canvas.runner import Case, Result
from eval.canvas.table import asked, cells, figures, heads, number, scored
from eval.tables import Table
from vltok.report import RelevanceRecord

TAU = vltok.ToDRE(stages=(2,)).tau
NEVER = "never"


def cases(keep_ratios: Sequence[float], num_layers: int) -> list[Case]:
    """For each keep ratio a case that drops nothing, then one for each layer after which all visual tokens leave."""
    depths = tuple(layer / num_layers for layer in range(1, num_layers))
    chosen = []
    for ratio in keep_ratios:
        chosen.append(Case(NEVER, ratio, vltok.ToDRE(keep_ratio=ratio, depth=depths, tau=0.0)))
        chosen += [
            Case(str(layer), ratio, vltok.ToDRE(keep_ratio=ratio, depth=depth, tau=1.0))
            for layer, depth in enumerate(depths, 1)
        ]
    return chosen


def default_layer(num_layers: int) -> int:
    """After which layer stage 2 looks by default."""
    return vltok.ToDRE(stages=(2,)).layers(num_layers)[0]


def records(results: Sequence[Result]) -> list[dict[str, object]]:
    """One flat record per case, in their order: what was seen after the layer, and what dropping there did."""
    rows = []
    seen: dict[int, list[RelevanceRecord]] = {}
    for result in results:
        name, layer = result.case.name, None
        if name == NEVER:
            seen = {}
            for record in result.relevance:
                seen.setdefault(record.layer, []).append(record)
        else:
            layer = int(name)
        row: dict[str, object] = {"keep_ratio": result.case.keep_ratio, "dropped_after": layer}
        row |= _looked_at(seen[layer]) if layer else dict.fromkeys(_looked_at([]))
        row["dropped"] = number(np.mean([record.dropped for record in result.relevance]))
        rows.append(row | figures(result))
    return rows


def _looked_at(seen: Sequence[RelevanceRecord]) -> dict[str, object]:
    """Both attention ratios after a layer over all prompts, and the share of prompts at which the default tau drops."""
    text = np.array([record.alpha_tv for record in seen] or [np.nan])
    visual = np.array([record.alpha_vt for record in seen] or [np.nan])
    low, high = np.quantile(text, [0.1, 0.9])
    return {
        "text_to_visual": number(text.mean()),
        "text_to_visual_low": number(low),
        "text_to_visual_high": number(high),
        "visual_to_text": number(visual.mean()),
        "fires_by_default": number(np.mean((text < TAU) & (visual < TAU))),
    }


def render(rows: Sequence[dict[str, object]]) -> Table:
    """The table for people."""
    scores = scored(rows)
    table = Table(
        ["keep", "dropped\nafter", "text to visual, %", "fires", *heads(scores), "tokens\n/layer", "KV\nKiB"],
        title="All visual tokens dropped after a decoder layer: accuracy in % (95 % interval). "
        f"Questions: {asked(rows[0])}",
        notes=[
            "text to visual: share of the text's attention on visual tokens, mean (10-90 % of the prompts); "
            f"fires: prompts at which stage 2 would drop there, tau {TAU:g}"
        ],
        left=0,
    )
    for k, row in enumerate(rows):
        if k and rows[k - 1]["keep_ratio"] != row["keep_ratio"]:
            table.section()
        looked = [NEVER, None, None]
        if row["dropped_after"]:
            mean, low, high = (100 * row[f"text_to_visual{end}"] for end in ("", "_low", "_high"))
            fires = f"{100 * row['fires_by_default']:.1f} %"
            looked = [row["dropped_after"], f"{mean:.0f} ({low:.0f}-{high:.0f})", fires]
        costs = [f"{row['tokens_per_layer']:.0f}", f"{row['kv_bytes'] / 1024:.0f}"]
        table.add(f"{100 * row['keep_ratio']:g} %", *looked, *cells(row, scores), *costs)
    return table
