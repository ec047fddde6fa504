"""The state of a call on a prompt with images or videos, whose tokens are being picked, packed and placed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vltok.engine.cache import left_out_before
from vltok.engine.call import Call, Hints
from vltok.engine.features import Encoding
from vltok.engine.layout import Layout, since_begin
from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid3

if TYPE_CHECKING:
    from vltok.engine.pictures import Picture, Source
    from vltok.visual import TokenRule, TokenSelector


class Prompt(Call):
    """A prompt with images.

    All bookkeeping is done on the CPU after one transfer.

    Attributes:
        model: The model that was entered.
        ids: The prompts, (B, T), or None if embeddings were passed.
        kinds: What each placeholder stands for, (B, T), int8, on the CPU: 0 for none, else 1 + its number in `KINDS`.
        visual: Where the placeholders are, (B, T), bool, on the CPU.
        attended: What is no padding, (B, T), bool, on the CPU.
        encoded: The encoded pictures of each kind that the caller passed in.
        awaited: Kinds of pictures that are encoded while the prompt runs.
        encodings: What is known of pictures encoded meanwhile, by kind.
        thinned: Which features of each kind the model itself takes, bool, where it leaves some out.
        sources: All encoded pictures, where they were found in merged embeddings; else empty.
        pictures: The images and videos of the prompts, repeated prompts once.
        repeat: How often each prompt is repeated.
        picks: Kept positions within each image, for each picture.
        keep: Positions that are kept, (B, T), bool.
        entered: What entered the decoder, (B, P, D), without its graph, where a rule may ask for it.
        layouts: The packing of the prompt, then one more for every drop inside the decoder.
        counts: Kept tokens of each row in each layout, (B,) on the CPU.
        read: Decoder layers that the rule looks at, from 0.
        decisions: For each of them that was looked at: what left, (B, T), bool, on the CPU.
        recorded: For each of them: what the rule said, as `State.record` takes it.
        remembered: What was decided on the prompt that this one continues.
    """

    __slots__ = (
        "_labels",
        "_samples",
        "attended",
        "awaited",
        "counts",
        "decisions",
        "delta",
        "encoded",
        "encodings",
        "engine",
        "entered",
        "hints",
        "ids",
        "keep",
        "kinds",
        "layouts",
        "model",
        "outer",
        "picks",
        "pictures",
        "read",
        "recorded",
        "remembered",
        "repeat",
        "rule",
        "selector",
        "sources",
        "thinned",
        "visual",
    )

    def __init__(
        self,
        engine: Any,
        model: torch.nn.Module,
        cache: Any,
        base: int,
        mask: Any,
        ids: torch.Tensor | None,
        kinds: torch.Tensor,
        attended: torch.Tensor,
        hints: Hints,
    ) -> None:
        super().__init__(cache, base, kinds.shape[1], mask)
        self.engine = engine
        self.model = model
        self.ids = ids
        self.kinds = kinds
        self.visual = kinds > 0
        self.attended = attended
        self.hints = hints
        self.encoded: dict[str, Any] = {}
        self.awaited: list[str] = []
        self.encodings: dict[str, Encoding | None] = {}
        self.sources: list[Source] = []
        self.thinned: dict[str, torch.Tensor] = {}
        self.outer: Any = None
        self.selector: TokenSelector | None = None
        self.rule: TokenRule | None = None
        self.pictures: list[Picture] = []
        self.picks: list[torch.Tensor] = []
        self.repeat = 1
        self.keep: torch.Tensor | None = None
        self.entered: torch.Tensor | None = None
        self.layouts: list[Layout] = []
        self.counts: list[torch.Tensor] = []
        self.decisions: dict[int, torch.Tensor] = {}
        self.recorded: dict[int, list] = {}
        self.read: frozenset[int] = frozenset()
        self.remembered: dict[int, tuple] = {}
        self.delta: torch.Tensor | None = None
        self._labels: list[tuple[torch.Tensor, torch.Tensor, bool]] = []
        self._samples: torch.Tensor | None = None

    @property
    def is_reindexed(self) -> bool:
        return self.selector is not None and self.selector.positions == "reindex"

    @property
    def is_stretched(self) -> bool:
        """Whether kept tokens are spread over the positions of their run."""
        return self.selector is not None and self.selector.positions == "stretch"

    def samples(self) -> torch.Tensor | None:
        return self._samples

    def starts(self) -> torch.Tensor:
        if self._samples is None:
            return super().starts()
        places = torch.arange(self.length, device=self.device).expand_as(self._samples)
        return since_begin(self._samples, places)

    def split_samples(self, samples: torch.Tensor | None) -> None:
        """Say which packed sample each token belongs to, (B, T), or that rows hold one sample each."""
        self._samples = samples

    def meet(self, kind: str, encoding: Encoding | None) -> None:
        """Pictures were encoded while this prompt ran. Some models encode videos by their encoder of images."""
        for other in [name for name, known in self.encodings.items() if known is encoding]:
            del self.encodings[other]
        missing = [name for name in self.awaited if name not in self.encodings]
        self.encodings[kind if kind in missing or not missing else missing[0]] = encoding

    def take_maps(self, mask: Any) -> None:
        """Take the attention maps that the model made for its decoder, where image tokens may see what comes later.

        Raises:
            UnsupportedInputError: If they are of a kind that can't be cut.
        """
        made = mask if isinstance(mask, dict) else {None: mask}
        if self.maps:
            return
        for each in made.values():
            if each is not None and not isinstance(each, torch.Tensor):
                raise UnsupportedInputError(
                    f"this model makes its attention maps itself, and vltok can't cut a {type(each).__name__}; load "
                    'the model with attn_implementation="sdpa"'
                )
        self.maps = {kind: each for kind, each in made.items() if each is not None and each.dim() == 4}

    def grid_of(self, picture: Picture) -> Grid3 | None:
        """Frames, rows and columns of a picture before any token left, or None."""
        encoding = picture.encoding
        if encoding is None:
            return None
        return self.engine.family.grid(self.model, encoding, picture.offset, picture.length)

    def rows_of_pictures(self) -> list[list[int]]:
        """The pictures of each row, by number."""
        rows: list[list[int]] = [[] for _ in self.visual]
        for row, own in enumerate(rows):
            own += [number for number, picture in enumerate(self.pictures) if picture.row == row // self.repeat]
        return rows

    def add_layout(self, keep: torch.Tensor, attended: torch.Tensor) -> None:
        """Lay out the positions where `keep` (B, T) is true; `attended` (B, T), on the CPU, are those seen as keys."""
        kept = keep.sum(1)
        length = max(1, int(kept.max()))
        keep = keep.to(self.device)
        layout = Layout.from_mask(keep, length, self._samples, is_whole=bool((kept == self.length).all()))
        queries = (layout.order + self.base).masked_fill(~layout.real, -1)
        keys = queries.masked_fill(~layout.pack(attended.to(self.device)), -1)
        counts = attended.sum(1)
        self.layouts.append(layout)
        self.counts.append(counts)
        self._labels.append((queries, keys, bool((counts == length).all())))

    def new_labels(self, group: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        return self._labels[group]

    def places_in_samples(self, group: int) -> torch.Tensor | None:
        """Where in its sample each slot of a layout is, (B, P), by which flash attention tells packed samples apart."""
        if self._samples is None:
            return None
        samples = self.layouts[group].pack(self._samples)
        slots = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
        return slots - since_begin(samples, slots)

    def place(self, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Give the packed tokens their positions, and note that of the next token.

        Args:
            position_ids: The caller's, (1 | B, T) or (axes, 1 | B, T), or None for those that follow the tokens before.
        """
        device = self.device
        is_counted = position_ids is None
        if is_counted:
            position_ids = torch.arange(self.base, self.base + self.length, device=device).unsqueeze(0)
        position_ids = position_ids.to(device)
        position_ids = position_ids.expand(*position_ids.shape[:-2], *self.visual.shape)
        attended = self.attended.to(device)
        if self.is_reindexed:
            is_out = attended & ~self.keep.to(device)
            left_out = is_out.cumsum(1)
            if self._samples is not None:
                left_out = left_out - since_begin(self._samples, left_out - is_out.long())
            if self.base:
                left_out = left_out + left_out_before(self.cache, self.mask, self.base).to(device)
            position_ids = position_ids - left_out
        if self.is_stretched:
            position_ids = self._stretched(position_ids)
        axes = position_ids if position_ids.dim() == 2 else position_ids[-3:].amax(0)
        # Text goes on behind the farthest axis: an image at the end reaches further on one than on another. Positions
        # that the decoder counts by itself go on behind padding, too.
        last = axes[:, -1] if is_counted else axes.masked_fill(~attended, -1).amax(1)
        self.delta = last + 1 - (self.base + self.length)
        return self.layouts[0].pack(position_ids, dim=-1)

    def _stretched(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions, (B, T), with the kept tokens of each run of placeholders spread evenly over those of the run."""
        position_ids, places = position_ids.clone(), self.keep.cpu() & self.visual
        begins = self.visual & ~torch.nn.functional.pad(self.visual, (1, 0))[:, :-1]
        ends = self.visual & ~torch.nn.functional.pad(self.visual, (0, 1))[:, 1:]
        for (row, begin), (_, end) in zip(begins.nonzero().tolist(), ends.nonzero().tolist(), strict=True):
            own = begin + places[row, begin : end + 1].nonzero().squeeze(1)
            if len(own):
                spread = begin + torch.arange(len(own)) * (end - begin) // max(1, len(own) - 1)
                position_ids[row, own.to(self.device)] = position_ids[row, spread.to(self.device)]
        return position_ids

    def drop(self, index: int, gone: torch.Tensor) -> None:
        """Take tokens out of the decoder layers after layer `index`.

        Args:
            index: The layer that was looked at, from 0.
            gone: What leaves, (B, T), bool, on the CPU.
        """
        self.decisions[index] = gone
        if index + 1 == len(self.groups):
            return
        gone = gone & self.keep
        if not gone.any():
            return
        self.keep = self.keep & ~gone
        self.add_layout(self.keep, self.keep & self.attended)
        self.groups[index + 1 :] = [len(self.layouts) - 1] * (len(self.groups) - index - 1)
