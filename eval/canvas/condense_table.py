"""What training did to condensing projectors, as one table: mean and range over seeds."""

from collections.abc import Sequence

from rich.table import Table

from eval.canvas.data import KINDS


def render(records: Sequence[dict]) -> Table:
    """Accuracies in % of the runs' results, a row per part, projector and split: mean, and min to max over seeds.

    "all" is the share of all test questions; validation asks its own mix of kinds, so it has none.
    """
    steps = sorted({f"{r['budget']['steps']} x {r['budget']['batch_size']}" for r in records})
    table = Table(title=f"Accuracy in %, mean (min-max) over seeds; steps x canvases: {', '.join(steps)}")
    for name in ("part", "projector", "split"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "seeds", *KINDS, "all"):
        table.add_column(name, no_wrap=True, justify="right")
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((run["part"], run["tokens"], run["kind"]), []).append(record)
    for (part, tokens, kind), group in groups.items():
        splits = {"untrained, val": [r["untrained"] for r in group], "val": [r["val"] for r in group]}
        if all("test" in r for r in group):
            splits["test"] = [_shares(**r["test"]) for r in group]
        for split, values in splits.items():
            cells = [spread([value[name] for value in values]) for name in (*KINDS, "all") if name in values[0]]
            table.add_row(part, kind, split, str(tokens), str(len(group)), *cells)
        table.add_section()
    return table


def _shares(hits: dict[str, int], asked: dict[str, int]) -> dict[str, float]:
    """Shares of right answers, per kind and over all questions."""
    shares = {kind: hits[kind] / max(1, asked[kind]) for kind in KINDS}
    return shares | {"all": sum(hits.values()) / max(1, sum(asked.values()))}


def spread(shares: Sequence[float]) -> str:
    """Shares as percentages: mean, and where there are several the smallest and the largest."""
    mean = 100 * sum(shares) / len(shares)
    return f"{mean:.1f}" + (f" ({100 * min(shares):.1f}-{100 * max(shares):.1f})" if len(shares) > 1 else "")
