"""What training did to condensing projectors, as one table: mean and range over seeds."""

from collections.abc import Sequence

from eval.canvas.data import KINDS
from eval.canvas.runner import SCORES
from eval.canvas.table import heads
from eval.tables import Table


def render(records: Sequence[dict]) -> Table:
    """Accuracies in % of the runs' results, a row per part, projector and split: mean, and min to max over seeds.

    "all" is the share of all test questions, and the overlap of boxes is that of answers to them; validation asks its
    own mix of kinds and sees each answer word by word, so it has neither.
    """
    steps = sorted({"{steps} x {batch_size}".format(**r["run"]["budget"]) for r in records})
    table = Table(
        ["part", "projector", "split", "tokens", "seeds", *heads(SCORES)],
        title=f"Accuracy in %, mean (min-max) over seeds; steps x canvases: {', '.join(steps)}",
        left=3,
    )
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((run["part"], run["tokens"], run["kind"]), []).append(record)
    for (part, tokens, kind), group in groups.items():
        splits = {"untrained, val": [r["untrained"] for r in group], "val": [r["val"] for r in group]}
        if all("test" in r for r in group):
            splits["test"] = [_shares(**r["test"]) for r in group]
        for split, values in splits.items():
            cells = [spread([v[name] for v in values if v.get(name) is not None]) for name in (*SCORES, "all")]
            table.add(part, kind, split, tokens, len(group), *cells)
        table.section()
    return table


def _shares(hits: dict[str, int], asked: dict[str, int]) -> dict[str, float]:
    """Shares of right answers, per score and over all questions."""
    shares = {score: hits.get(score, 0) / asked[score] for score in SCORES if asked.get(score)}
    return shares | {"all": sum(hits.get(kind, 0) for kind in KINDS) / sum(asked.get(kind, 0) for kind in KINDS)}


def spread(shares: Sequence[float]) -> str | None:
    """Shares as percentages: mean, and where there are several the smallest and the largest; None of none."""
    if not shares:
        return None
    mean = 100 * sum(shares) / len(shares)
    return f"{mean:.1f}" + (f" ({100 * min(shares):.1f}-{100 * max(shares):.1f})" if len(shares) > 1 else "")
