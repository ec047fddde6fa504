"""Costs as a table, in words, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.cost.bench import Row
from eval.cost.parts import PARTS
from eval.tables import Table

COLORS = dict(zip(PARTS, ("#4c72b0", "#8fb0d9", "#c44e52", "#dd8452", "#55a868", "#b0b0b0"), strict=True))


def table(rows: Sequence[Row], title: str) -> Table:
    """All cases: times in ms, ratios of the whole answer."""
    times = ("tower", "projector", "selector", "prefill", "ms per\ntoken", "other")
    ratios = ("first token\n/ unpruned", "whole\n/ unpruned", "whole\n/ short", "tokens\n/ short")
    found = Table(("case", "visual\ntokens", *times, "whole\nms", *ratios, "KV\nMiB", "peak\nMiB", "GFLOPs"), title)
    for row in rows:
        ms = [row.milliseconds[name] for name in ("tower", "projector", "selector", "prefill")]
        cells = [*ms, row.per_token, row.milliseconds["other"], row.milliseconds["whole"]]
        short = row.to_native
        shares = [f"{each:.2f}" for each in (row.first_to_unpruned, row.to_unpruned[1])]
        shares += [None, None] if short is None else [f"{short[1]:.3f}\n({short[0]:.2f}-{short[2]:.2f})"]
        shares += [] if short is None else [f"{row.decode_to_native:.3f}"]
        found.add(
            row.case,
            row.visual_tokens,
            *(f"{each:.1f}" for each in cells),
            *shares,
            *(f"{each / 2**20:.1f}" for each in (row.kv_bytes, row.peak_bytes)),
            None if row.flops is None else f"{before_first(row.flops) / 1e9:.1f}",
        )
    return found


def before_first(flops) -> int:
    """Operations until the first token."""
    return flops.tower + flops.projector + flops.prefill


def words(rows: Sequence[Row], prompt_tokens: int) -> list[str]:
    """Where pruning pays here, where it doesn't, and why: sentences about rows, the first of which is unpruned.

    Args:
        rows: The rows.
        prompt_tokens: Tokens of the unpruned prompt.
    """
    base, lines = rows[0], []
    ms = base.milliseconds
    encoding, first = ms["tower"] + ms["projector"], sum(ms[name] for name in PARTS[:4])
    share = base.visual_tokens / prompt_tokens
    lines.append(
        f"Visual tokens are {100 * share:.0f} % of the prompt. Tower and projector take {100 * encoding / first:.0f} % "
        f"of the time to the first token, which no selector shortens: at best it is {_times(first, encoding)} as fast."
    )
    if encoding > first / 2:
        lines.append("Tower-bound: fewer pixels, or a method that works in the tower, would gain more than a selector.")
    if share < 0.5:
        lines.append("Mostly text: most of the decoder's work is text, which stays.")
    lines += [_verdict(base, row) for row in rows[1:] if not row.case.startswith("short prompt")]
    if (full := base.full_flops) is not None:
        rest = full.tower + full.projector
        lines.append(
            f"At full size, counted and not measured: {before_first(full) / 1e12:.2f} TFLOPs until the first token, "
            f"{100 * rest / before_first(full):.0f} % of them in tower and projector; a decoded token takes "
            f"{full.decode / 1e9:.1f} GFLOPs."
        )
        pruned = [r for r in rows[1:] if r.full_flops is not None and not r.case.startswith("short prompt")]
        shares = [f"{r.case} {before_first(r.full_flops) / before_first(full):.2f}" for r in pruned]
        lines += [f"There, operations until the first token / unpruned: {', '.join(shares)}."] if shares else []
    for what, name in (
        ("the parts add up to", "parts_to_whole"),
        ("hooks, or noise, make the answer take", "hooks_to_whole"),
    ):
        if wrong := [f"{row.case} ({getattr(row, name):.2f})" for row in rows if abs(getattr(row, name) - 1) > 0.05]:
            lines.append(
                f"Don't trust the parts where {what} more than 5 % more or less than the whole: {', '.join(wrong)}."
            )
    return lines


def _verdict(base: Row, row: Row) -> str:
    low, middle, high = row.to_unpruned
    saved = base.milliseconds["prefill"] - row.milliseconds["prefill"]
    picking = row.milliseconds["selector"]
    costs = f"picking takes {picking:.1f} ms and the prefill {abs(saved):.1f} ms {'less' if saved >= 0 else 'more'}"
    memory = f"the KV cache is {row.kv_bytes / base.kv_bytes:.2f} of the unpruned one"
    if high < 0.98:
        verdict = f"pays, the answer takes {middle:.2f} of the time"
    elif low > 1.02:
        verdict = f"does not pay in time, the answer takes {middle:.2f} of the unpruned time"
    else:
        verdict = f"makes no clear difference in time ({low:.2f} to {high:.2f})"
    return f"{row.case}: {verdict}; {costs}; {memory}."


def _times(whole: float, part: float) -> str:
    return "any number of times" if part <= 0 else f"{whole / part:.1f} times"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a bar for each case, its parts one after another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for name in PARTS:
        values = [row.milliseconds[name] for row in rows]
        axis.barh(range(len(rows)), values, left=left, label=name, color=COLORS[name], height=0.7)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, (row, end) in enumerate(zip(rows, left, strict=True)):
        axis.text(end, place, f" {end:.0f} ms, KV {row.kv_bytes / 2**20:.1f} MiB", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(left))
    axis.set_xlabel("ms of an answer")
    axis.set_title(title.replace("; ", "\n"), fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
