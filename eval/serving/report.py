"""Ratios to the unpruned engine, as a table in markdown, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.serving.engine import Load


@dataclass(frozen=True)
class Row:
    """A case under so many requests at once; ratios are medians over the rounds of those within a round.

    Attributes:
        case: The method as text, or "unpruned".
        concurrency: Requests in the engine at a time.
        per_second: Requests answered in a second, as a ratio to the unpruned engine's.
        first_token: Time to the first token, as such a ratio.
        prompt_tokens: Tokens of a prompt.
        kv_blocks: The most blocks of the KV cache in use at a time, as such a ratio.
        encoder: Time in the encoder, pruning included, as such a ratio.
        encoder_share: Share of all time that goes into the encoder.
        seconds: Median time of a request, for orientation: it holds for this machine at this hour only.
        accuracy: Share of canvas questions that the embedded model answers rightly, or None.
    """

    case: str
    concurrency: int
    per_second: float
    first_token: float
    prompt_tokens: float
    kv_blocks: float
    encoder: float
    encoder_share: float
    seconds: float
    accuracy: float | None

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            self.case,
            str(self.concurrency),
            f"{self.per_second:.2f}",
            f"{self.first_token:.2f}",
            f"{self.prompt_tokens:.0f}",
            f"{self.kv_blocks:.2f}",
            f"{self.encoder:.2f}",
            f"{100 * self.encoder_share:.0f} %",
            f"{self.seconds:.2f}",
            "" if self.accuracy is None else f"{100 * self.accuracy:.0f} %",
        ]


HEAD = (
    "case",
    "concurrency",
    "requests/s",
    "first token",
    "prompt tokens",
    "KV blocks",
    "encoder",
    "encoder's share",
    "s/request",
    "canvas accuracy",
)


def rows(rounds: dict[str, list[list[Load]]], accuracy: dict[str, float]) -> list[Row]:
    """Compare each case with the first one.

    Args:
        rounds: By case, unpruned first: for each round, the loads at each concurrency, in one order.
        accuracy: By case, 0..1; may lack cases.
    """
    base = next(iter(rounds.values()))
    made = []
    for case, own in rounds.items():
        for level, loads in enumerate(zip(*own, strict=True)):
            pairs = list(zip(loads, (each[level] for each in base), strict=True))

            def ratio(name: str, pairs: Sequence[tuple[Load, Load]] = pairs) -> float:
                return statistics.median(getattr(mine, name) / getattr(plain, name) for mine, plain in pairs)

            made.append(
                Row(
                    case=case,
                    concurrency=loads[0].concurrency,
                    per_second=ratio("per_second"),
                    first_token=ratio("first_token"),
                    prompt_tokens=statistics.fmean(load.prompt_tokens for load in loads),
                    kv_blocks=ratio("kv_blocks"),
                    encoder=statistics.median(
                        (mine.encoder_seconds / mine.requests) / (plain.encoder_seconds / plain.requests)
                        for mine, plain in pairs
                    ),
                    encoder_share=statistics.median(load.encoder_seconds / load.seconds for load in loads),
                    seconds=statistics.median(1 / load.per_second for load in loads),
                    accuracy=accuracy.get(case),
                )
            )
    return made


def markdown(table: Sequence[Row]) -> str:
    """The table as GitHub reads it."""
    lines = [list(HEAD), ["---"] * len(HEAD), *(row.cells() for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(table: Sequence[Row], path: Path) -> None:
    """Draw requests per second, time to the first token and KV blocks over the concurrency, one line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Any] = {
        "requests per second / unpruned": "per_second",
        "time to first token / unpruned": "first_token",
        "KV blocks / unpruned": "kv_blocks",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    levels = sorted({row.concurrency for row in table})
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        for case in dict.fromkeys(row.case for row in table):
            own = [row for row in table if row.case == case]
            is_plain = case == table[0].case
            axis.plot(
                [levels.index(row.concurrency) for row in own],
                [getattr(row, name) for row in own],
                marker=None if is_plain else "o",
                color="black" if is_plain else None,
                linestyle="--" if is_plain else "-",
                linewidth=1 if is_plain else 1.6,
                label=case,
            )
        axis.set_xticks(range(len(levels)), [str(level) for level in levels])
        axis.set_xlabel("requests at a time")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
