"""Prompt: one call with images, from the placeholders to the layout that the language model gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn

from vltok.engine.features import Encoding, ImageTokens
from vltok.engine.layout import Layout
from vltok.errors import UnsupportedInputError
from vltok.report import RelevanceRecord, Report
from vltok.tokens import keep_count
from vltok.views import TokenSelector, VisualTokens


@dataclass
class Prompt:
    """The state of one call with images: made when the model is entered, gone when it is left.

    Attributes:
        model: The model that was entered.
        ids: The prompts, (B, T), or None if embeddings were passed.
        visual: Where the placeholders are, (B, T), bool, on the CPU: all bookkeeping is done there after one transfer.
        attended: The attention mask, (B, T), bool, on the CPU.
        encoded: The encoded images, where `generate` passed them in.
        keep: Positions that are kept, (B, T), bool.
        layouts: The packing of the prompt, then one more for every drop inside the decoder.
        counts: Kept tokens of each row in each layout, (B,) on the CPU.
        group: For each decoder layer, the layout it works on.
        dropped: Rows whose visual tokens have left the decoder, (B,), bool, on the CPU.
        decisions: For each decoder layer looked at (from 0): both ratios and the decision, (3, B), on the CPU.
        next_position: Position of the next token, (B,).
        shift: How far re-indexed positions lie behind the caller's, (B,).
        masks: Attention masks of the layouts made inside the decoder.
        picked: Kept positions within each image, for each row.
        lengths: Visual tokens of each image, for each row.
    """

    model: nn.Module
    ids: torch.Tensor | None
    visual: torch.Tensor
    attended: torch.Tensor
    encoded: object | None
    keep: torch.Tensor | None = None
    layouts: list[Layout] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    dropped: torch.Tensor | None = None
    decisions: dict[int, torch.Tensor] = field(default_factory=dict)
    next_position: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)
    picked: list[list[torch.Tensor]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)

    @property
    def text_counts(self) -> torch.Tensor:
        """Text tokens of each row, (B,), on the CPU."""
        return (self.attended & ~self.visual).sum(1)

    def select(
        self, embeds: torch.Tensor, family: Any, encoding: Encoding | None, selector: TokenSelector | None
    ) -> None:
        """Choose the tokens to keep of every image and lay the prompt out.

        Args:
            embeds: What would enter the language model, (B, T, D).
            family: The family of the model.
            encoding: The last encoded images.
            selector: Who chooses; None keeps all.
        """
        device = embeds.device
        images, owners, repeat = self._images(family, encoding)
        visual = self.visual[::repeat]
        embeds = embeds.detach()[::repeat]
        place = visual.flatten().nonzero().squeeze(1).to(device)  # of each visual token in the flattened batch
        starts = list(accumulate((image.length for image in images), initial=0))
        flat = embeds.flatten(0, 1)
        if self.encoded is not None:
            self._check_encoding(flat[place[starts[:-1]]], encoding.features, images)
        keep = (self.attended & ~self.visual)[::repeat].contiguous().to(device)
        picks: list[torch.Tensor] = [torch.empty(0)] * len(images)
        for members in _by_length(images):
            first = torch.tensor([starts[i] for i in members], device=device).unsqueeze(1)
            where = place[first + torch.arange(images[members[0]].length, device=device)]  # (G, N)
            kept = _pick(flat[where], [images[i] for i in members], selector)
            keep.view(-1)[where.gather(1, kept).flatten()] = True
            for image, indices in zip(members, kept, strict=True):
                picks[image] = indices
        rows = [[i for i, owner in enumerate(owners) if owner == row // repeat] for row in range(len(self.visual))]
        self.picked = [[picks[i] for i in row] for row in rows]
        self.lengths = [[images[i].length for i in row] for row in rows]
        self.keep = keep.repeat_interleave(repeat, 0)
        kept_visual = torch.tensor([sum(len(indices) for indices in row) for row in self.picked])
        self.add_layout(self.keep, self.text_counts + kept_visual)

    def add_layout(self, keep: torch.Tensor, counts: torch.Tensor) -> Layout:
        """Lay out the positions where `keep` (B, T) is true, `counts` (B,) of them on the CPU."""
        layout = Layout.from_mask(keep, int(counts.max()))
        self.layouts.append(layout)
        self.counts.append(counts)
        return layout

    def place(self, position_ids: torch.Tensor | None, reindex: bool) -> torch.Tensor:
        """Give the packed tokens their positions, and note that of the next token.

        Args:
            position_ids: The caller's, (1 | B, T) or (axes, 1 | B, T), or None for 0..T-1.
            reindex: Count the kept tokens without gaps.
        """
        keep = self.keep
        if position_ids is None:
            position_ids = torch.arange(keep.shape[1], device=keep.device).unsqueeze(0)
        position_ids = position_ids.to(keep.device)
        position_ids = position_ids.expand(*position_ids.shape[:-2], *keep.shape)
        left_out = (self.visual.to(keep.device) & ~keep).cumsum(1)  # visual tokens dropped up to here
        self.next_position = next_position(position_ids)
        if reindex:
            position_ids = position_ids - left_out
            self.shift = left_out[:, -1]
            self.next_position = self.next_position - self.shift
        elif position_ids.dim() == 3 and position_ids.shape[0] == 4:
            # The first of four axes only tells packed sequences apart by gaps; pruning must not look like one.
            position_ids = torch.cat([position_ids[:1] - left_out, position_ids[1:]])
        return self.layouts[0].pack(position_ids, dim=-1)

    def drop_visual(self, index: int, decision: torch.Tensor) -> None:
        """Take the visual tokens of some rows out of the decoder layers after layer `index`.

        Args:
            index: The layer that was looked at, from 0.
            decision: Both ratios and the decision for each row, (3, B), on the CPU.
        """
        self.decisions[index] = decision
        fresh = decision[2].bool() & ~self.dropped & torch.tensor([bool(row) for row in self.picked])
        if not fresh.any() or index + 1 == len(self.group):
            return
        self.dropped |= fresh
        gone = self.dropped.unsqueeze(1) & self.visual
        self.add_layout(
            self.keep & ~gone.to(self.keep.device), torch.where(self.dropped, self.text_counts, self.counts[0])
        )
        self.group[index + 1 :] = [len(self.layouts) - 1] * (len(self.group) - index - 1)

    def report(self, cache: Any) -> Report:
        """Say what was done, after the prompt has run."""
        layers = getattr(cache, "layers", None) or ()
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        records: list[list[RelevanceRecord]] = [[] for _ in self.picked]
        for index, (alpha_tv, alpha_vt, drop) in sorted(self.decisions.items()):
            for row, images in enumerate(self.picked):
                if images:
                    ratios = float(alpha_tv[row]), float(alpha_vt[row])
                    records[row].append(RelevanceRecord(index + 1, *ratios, bool(drop[row])))
        return Report(
            visual_tokens=self.lengths,
            kept_tokens=[[len(indices) for indices in row] for row in self.picked],
            keep_indices=self.picked,
            tokens_per_layer=torch.stack([self.counts[group] for group in self.group], dim=1),
            kv_entries=[layer.get_seq_length() for layer in layers],
            kv_bytes=sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)),
            relevance=records,
        )

    def _images(self, family: Any, encoding: Encoding | None) -> tuple[list[ImageTokens], list[int], int]:
        """The images in order, the row each belongs to, and how often each row is repeated."""
        if encoding is None or encoding.features is None:
            raise UnsupportedInputError(
                "the images of this prompt were encoded before the method was attached; pass pixel_values"
            )
        # generate() repeats every prompt for its beams or samples, but encodes the images once.
        for repeat in (n for n in range(1, len(self.visual) + 1) if len(self.visual) % n == 0):
            rows = self.visual[::repeat]
            runs = [len(list(run)) for row in rows.tolist() for is_visual, run in groupby(row) if is_visual]
            images = family.images(self.model, encoding, runs)
            owners = _owners([image.length for image in images], rows.sum(1).tolist())
            if images and owners is not None and torch.equal(rows.repeat_interleave(repeat, 0), self.visual):
                return images, owners, repeat
        raise UnsupportedInputError(
            f"the prompts have {self.visual.sum(1).tolist()} image placeholders, which don't fit the images encoded "
            "last; pass the pixel_values of these very prompts"
        )

    def _check_encoding(self, arrived: torch.Tensor, features: torch.Tensor, images: list[ImageTokens]) -> None:
        expected = features.flatten(0, -2)[[image.first for image in images]]
        if not torch.equal(arrived, expected.to(arrived)):
            raise UnsupportedInputError(
                "the encoded images passed in are not the ones this model encoded last while the method was attached; "
                "pass pixel_values"
            )


def next_position(position_ids: torch.Tensor) -> torch.Tensor:
    """Where text goes on after tokens at (B, T) or (axes, B, T): (B,).

    On several axes that is behind the farthest of them, as an image at the end reaches further on one than on another.
    The first of four axes is no rotary position.
    """
    return position_ids[..., -1] + 1 if position_ids.dim() == 2 else position_ids[-3:].amax((0, -1)) + 1


def _owners(lengths: list[int], room: list[int]) -> list[int] | None:
    """Deal images to rows in order so that each row's placeholders are used up, or None if that doesn't come out."""
    owners: list[int] = []
    left = iter(lengths)
    for row, places in enumerate(room):
        while places > 0:
            places -= next(left, places + 1)
            owners.append(row)
        if places < 0:
            return None
    return None if next(left, None) is not None else owners


def _by_length(images: list[ImageTokens]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.length, []).append(index)
    return list(groups.values())


def _pick(embeddings: torch.Tensor, images: list[ImageTokens], selector: TokenSelector | None) -> torch.Tensor:
    """Ask the selector about images of equal length, (G, N, D) -> (G, K)."""
    group, length, _ = embeddings.shape
    device = embeddings.device
    if selector is None:
        return torch.arange(length, device=device).expand(group, length)
    num_keep = keep_count(length, selector.keep_ratio, selector.num_keep)
    if not embeddings.isfinite().all():
        raise UnsupportedInputError("the visual tokens contain NaN or infinity; check the image and the model's dtype")
    everything = torch.ones(length, dtype=torch.bool, device=device)
    attention = None
    if images[0].attention is not None:
        attention = torch.stack([image.attention for image in images]).to(device)
    visual = VisualTokens(
        embeddings=embeddings,
        image_keys=torch.stack([image.key for image in images]).to(device),
        attention=attention,
        is_overview=torch.stack(
            [everything if image.is_overview is None else image.is_overview.to(device) for image in images]
        ),
    )
    with torch.no_grad():
        return selector.select(visual, num_keep)
