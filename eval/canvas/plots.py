"""Canvas VQA pictures: accuracy against the number of visual tokens, and which patches each method kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from eval.canvas.data import GRID, PATCH
from eval.canvas.table import TITLES, scored

STYLES = {
    "ToDRE, stage 1": ("#c1272d", "o", "-"),
    "ToDRE, stages 1+2": ("#c1272d", "o", "--"),
    "DivPrune": ("#0000a7", "s", "-"),
    "FasterVLM": ("#008176", "D", "-"),
    "VisionZip": ("#008176", "d", "--"),
    "SCOPE": ("#d95f02", "h", "-"),
    "CDPruner": ("#0000a7", "s", "--"),
    "stride": ("#eeaa22", "^", "-"),
    "pool": ("#eeaa22", "p", ":"),
    "random": ("#777777", "v", "-"),
    "TokenPacker": ("#7b3294", "P", "-"),
    "average pooling": ("#7b3294", "X", ":"),
}


def plot_accuracy(
    rows: Sequence[dict[str, object]], path: Path, along: Literal["visual_tokens", "prefill_ratio"] = "visual_tokens"
) -> None:
    """One panel per question type: methods with 95 % intervals, the unpruned model, the wrong-image control.

    Args:
        rows: The records of the table; methods without a style of their own are left out.
        path: Where the PNG goes.
        along: What they stand over: visual tokens, or the time of the prefill as a ratio to the unpruned model's.
    """
    shown = scored(rows)
    size = -(-len(shown) // 4), min(4, len(shown))
    figure, grid = plt.subplots(
        *size, figsize=(15, 1 + 3.6 * size[0]), sharey=True, squeeze=False, layout="constrained"
    )
    over_tokens = along == "visual_tokens"
    named = {row["method"]: row for row in rows if row["keep_ratio"] == 1.0}
    for axis in grid.flat[len(shown) :]:
        axis.axis("off")
    for axis, score in zip(grid.flat, shown, strict=False):
        for number, (name, (colour, marker, line)) in enumerate(STYLES.items()):
            points = [row for row in rows if row["method"] == name and row[along] is not None]
            if not points:
                continue
            points.sort(key=lambda row: row["visual_tokens"])
            accuracy, low, high = (
                100 * np.array([row[f"{score}_{what}"] for row in points]) for what in ("accuracy", "low", "high")
            )
            # Points of the same number of tokens stand side by side, not on top of each other.
            beside = 1.025 ** (number - (len(STYLES) - 1) / 2) if over_tokens else 1.0
            style = {"label": name, "color": colour, "marker": marker, "linestyle": line, "markersize": 5}
            style |= {"yerr": np.maximum(0, [accuracy - low, high - accuracy]), "capsize": 2, "elinewidth": 0.7}
            axis.errorbar([row[along] * beside for row in points], accuracy, linewidth=1.4, **style)
        for name, line in (("unpruned", "--"), ("unpruned, wrong image", ":")):
            if name in named:
                height = 100 * named[name][f"{score}_accuracy"]
                axis.axhline(height, color="black", linestyle=line, linewidth=1, label=name)
        if over_tokens:
            ticks = sorted({round(row["visual_tokens"]) for row in rows if row["method"] != "pool"})
            axis.set_xscale("log")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_title(TITLES.get(score, score))
        axis.set_xlabel("visual tokens" if over_tokens else "time of the prefill, unpruned = 1")
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.25)
    for axis in grid[:, 0]:
        axis.set_ylabel("accuracy, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


SCORE_STYLES = {
    "exist": ("#c1272d", "o"),
    "quadrant": ("#0000a7", "s"),
    "where": ("#008176", "D"),
    "count": ("#eeaa22", "^"),
    "read": ("#777777", "v"),
    "box": ("#7b3294", "p"),
    "box_iou": ("#d95f02", "h"),
}
RATIO_STYLES = (("black", "-"), ("#7b3294", "--"), ("#d95f02", ":"), ("#777777", "-."))


def plot_depth(rows: Sequence[dict[str, object]], path: Path, tau: float, default_layer: int) -> None:
    """Two panels over the decoder's layers: what the text attends to, and accuracy without visual tokens behind.

    Args:
        rows: The records of `eval.canvas.stage2`.
        path: Where the PNG goes.
        tau: Below which stage 2 drops by default.
        default_layer: After which layer it looks by default.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    ratios = sorted({row["keep_ratio"] for row in rows}, reverse=True)
    layers = sorted({row["dropped_after"] for row in rows if row["dropped_after"]})
    never = layers[-1] + 1
    for number, ratio in enumerate(ratios):
        colour, line = RATIO_STYLES[number % len(RATIO_STYLES)]
        own = [row for row in rows if row["keep_ratio"] == ratio]
        seen = [row for row in own if row["dropped_after"]]
        mean, low, high = (
            100 * np.array([row[f"text_to_visual{end}"] for row in seen]) for end in ("", "_low", "_high")
        )
        fires = 100 * next(row["fires_by_default"] for row in seen if row["dropped_after"] == default_layer)
        label = f"{100 * ratio:g} % of the tokens kept; by default dropped at {fires:.1f} % of the prompts"
        left.plot(layers, mean, color=colour, linestyle=line, marker="o", label=label)
        left.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        for kind, (shade, marker) in SCORE_STYLES.items():
            points = [(row["dropped_after"] or never, row[f"{kind}_accuracy"]) for row in own]
            if points := sorted((place, 100 * share) for place, share in points if share is not None):
                style = {"color": shade, "marker": marker, "linestyle": line, "markersize": 5}
                label = f"{TITLES.get(kind, kind)}, {100 * ratio:g} %"
                right.plot(*zip(*points, strict=True), label=label, **style)
    left.axhline(100 * tau, color="#c1272d", linewidth=1, linestyle="--")
    left.annotate(f"tau, {100 * tau:g} %: dropped below it", (layers[0], 100 * tau + 1.5), color="#c1272d", fontsize=9)
    left.axvline(default_layer, color="#777777", linewidth=1, linestyle=":")
    left.annotate("looked at by default  ", (default_layer, 97), color="#555555", fontsize=9, ha="right")
    left.set_title("Text's attention to visual tokens\n(mean, band of 10 to 90 % of the prompts)", fontsize=11)
    left.set_ylabel("share of attention, %")
    left.set_xlabel("decoder layer")
    left.set_xticks(layers)
    right.set_title("Accuracy if all visual tokens are dropped after a layer", fontsize=11)
    right.set_ylabel("accuracy, %")
    right.set_xlabel("dropped after decoder layer")
    right.set_xticks([*layers, never], [*map(str, layers), "never"])
    for axis in (left, right):
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.25)
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.14), frameon=False, fontsize=9)  # between tau and the curves
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="question, tokens kept", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_kept(images: Sequence[np.ndarray], kept: dict[str, list[list[int]]], path: Path, title: str) -> None:
    """A row per picture: the picture, then what each method kept of it.

    Args:
        images: Pictures, (128, 128, 3) uint8.
        kept: Method name to kept grid positions of each picture.
        path: Where the PNG goes.
        title: Above everything.
    """
    columns = ["image", *kept]
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(2.05 * len(columns), 2.05 * len(images) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for row, image in enumerate(images):
        for axis, name in zip(axes[row], columns, strict=True):
            axis.imshow(image if name == "image" else _dim_dropped(image, kept[name][row]), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if name != "image":
                _outline(axis, kept[name][row])
            if row == 0:
                axis.set_title(name, fontsize=11)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dim_dropped(image: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """The picture with every dropped patch faded to a light grey."""
    mask = np.zeros(GRID * GRID, bool)
    mask[list(positions)] = True
    pixels = mask.reshape(GRID, GRID).repeat(PATCH, 0).repeat(PATCH, 1)[..., None]
    faded = 205 + (image.mean(axis=2, keepdims=True) - 128) * 0.18
    return np.where(pixels, image, faded).clip(0, 255).astype(np.uint8)


def _outline(axis: plt.Axes, positions: Sequence[int]) -> None:
    """A thin frame around each kept patch."""
    for position in positions:
        row, column = divmod(position, GRID)
        corner = (column * PATCH - 0.5, row * PATCH - 0.5)
        axis.add_patch(plt.Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="#c1272d", linewidth=0.7))
