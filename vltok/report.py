"""Report: what the last prompt cost and what was kept of its images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vltok.tokens import Grid3


@dataclass(frozen=True)
class RelevanceRecord:
    """Stage 2 at one decoder layer, for one sample.

    Attributes:
        layer: The layer looked at, counted from 1; a drop takes effect in the layers after it.
        alpha_tv: Share of the text tokens' attention that lies on visual tokens.
        alpha_vt: Share of the visual tokens' attention that lies on text tokens.
        dropped: Whether all visual tokens left after this layer.
    """

    layer: int
    alpha_tv: float
    alpha_vt: float
    dropped: bool


@dataclass(frozen=True)
class Condensed:
    """What a condensing projector did in its last call.

    Attributes:
        pictures: Images, or crops and tiles of images, that were projected.
        patches: Patches of each, as the projector got them.
        tokens: Visual tokens that each became.
    """

    pictures: int
    patches: int
    tokens: int


@dataclass(frozen=True)
class LinearAttention:
    """Where attention of linear cost stands in the vision tower.

    Attributes:
        blocks: The blocks that have it, as (start, stop).
        patches: Patches of an image of the size the tower was made for.
        landmarks: Landmarks of such an image, prefix tokens not counted.
    """

    blocks: tuple[int, int]
    patches: int
    landmarks: int


@dataclass(frozen=True)
class Pooling:
    """Where tokens are pooled before the attention in the vision tower.

    Attributes:
        blocks: The blocks that do, as (start, stop).
        scales: Scales they pool at, the token itself included.
    """

    blocks: tuple[int, int]
    scales: int


@dataclass(frozen=True)
class Merging:
    """What became of the patches of the last call in a vision tower that merges tokens.

    Attributes:
        source: Which of the tokens that are left each patch went into, (images or crops, patches), int64. Prefix
            tokens don't count. None before the first call.
    """

    source: torch.Tensor | None = None

    def __str__(self) -> str:
        if self.source is None:
            return "vision tower: merges tokens; no call yet"
        pictures, patches = self.source.shape
        left = int(self.source.max()) + 1 if self.source.numel() else 0
        return f"vision tower: {patches} patches merged into {left} tokens (images, crops: {pictures})"


@dataclass(frozen=True)
class Diversification:
    """The attention diversification loss of the last call in train mode.

    Attributes:
        blocks: The blocks whose attention it is about, as (start, stop).
        losses: The loss of each block that attended, unweighted, scalars. 0 where no attention exceeds the threshold.
    """

    blocks: tuple[int, int]
    losses: tuple[torch.Tensor, ...] = ()

    def __str__(self) -> str:
        values = [loss.item() for loss in self.losses]
        where = f"vision tower: attention diversification loss of blocks {self.blocks[0]} to {self.blocks[1] - 1}"
        if not values:
            return f"{where}: no call in train mode yet"
        empty = sum(value == 0 for value in values)
        note = f"; in {empty} of {len(values)} no attention exceeds the threshold" if empty else ""
        return f"{where} {sum(values) / len(values):.3f}, {min(values):.3f} to {max(values):.3f}{note}"


@dataclass(frozen=True)
class Report:
    """What the attached methods did in the last call.

    Attributes:
        images: Whether the last call had images, as far as a pruning method saw it; None if it saw none yet.
        attention: Where attention of linear cost stands in the vision tower, or None where there is none.
        pooling: Where tokens are pooled before the attention in the vision tower, or None.
        merging: What became of the patches where the vision tower merges tokens, or None.
        diversification: The attention diversification loss, or None.
        condensed: What a condensing projector did, or None where there is none. The rest is what pruning did.
        visual_tokens: Visual tokens of each image of each sample before pruning.
        kept_tokens: Visual tokens kept of each image of each sample at the entry of the language model.
        keep_indices: Which ones, ascending positions within the image, (K,) each.
        grids: Frames, rows and columns (T, H, W) that the visual tokens of each image form before pruning, row by row;
            None where they form none that is known.
        tokens_per_layer: Tokens each decoder layer worked on, (B, layers), int64, padding excluded.
        kv_entries: Entries in each layer's KV cache after the prompt, fill-up included; empty without a cache.
        kv_bytes: Bytes of all keys and values in the KV cache after the prompt, without the states of other layers.
        relevance: Stage 2 at each candidate layer, for each sample.
    """

    images: bool | None = None
    attention: LinearAttention | None = None
    pooling: Pooling | None = None
    merging: Merging | None = None
    diversification: Diversification | None = None
    condensed: Condensed | None = None
    visual_tokens: list[list[int]] = field(default_factory=list)
    kept_tokens: list[list[int]] = field(default_factory=list)
    keep_indices: list[list[torch.Tensor]] = field(default_factory=list)
    grids: list[list[Grid3 | None]] = field(default_factory=list)
    tokens_per_layer: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    kv_entries: list[int] = field(default_factory=list)
    kv_bytes: int = 0
    relevance: list[list[RelevanceRecord]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        if self.attention is not None:
            each = self.attention
            lines.append(
                f"vision tower: softmax-free attention in blocks {each.blocks[0]} to {each.blocks[1] - 1}, "
                f"{each.landmarks} landmarks for {each.patches} patches"
            )
        if self.pooling is not None:
            each = self.pooling
            lines.append(
                f"vision tower: tokens pooled at {each.scales} scales before attention in blocks {each.blocks[0]} to "
                f"{each.blocks[1] - 1}"
            )
        if self.merging is not None:
            lines.append(str(self.merging))
        if self.diversification is not None:
            lines.append(str(self.diversification))
        if self.condensed is not None:
            each = self.condensed
            lines.append(
                f"projector: {each.patches} patches -> {each.tokens} visual tokens (images, crops: {each.pictures})"
            )
        if self.images is False:
            lines.append("the last call had no images")
        if not lines and not self.visual_tokens:
            return "no prompt with images since the method was attached"
        for row, (before, after) in enumerate(zip(self.visual_tokens, self.kept_tokens, strict=True)):
            images = ", ".join(f"{n} -> {k}" for n, k in zip(before, after, strict=True)) or "no image"
            layers = _runs(self.tokens_per_layer[row].tolist())
            lines.append(f"sample {row}: visual tokens {images}; tokens per decoder layer {layers}")
            for record in self.relevance[row] if self.relevance else ():
                verdict = "dropped from the next layer on" if record.dropped else "kept"
                ratios = f"text to visual {record.alpha_tv:.3f}, visual to text {record.alpha_vt:.3f}"
                lines.append(f"  layer {record.layer}: {ratios}; visual tokens {verdict}")
        if self.kv_entries:
            lines.append(f"KV cache: {_runs(self.kv_entries)} entries per layer, {self.kv_bytes / 2**20:.2f} MiB")
        return "\n".join(lines)


def _runs(values: list[int]) -> str:
    """Write [5, 5, 3] as "5 (x2), 3"."""
    words: list[str] = []
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            words.append(f"{values[start]} (x{end - start})" if end - start > 1 else str(values[start]))
            start = end
    return ", ".join(words)
