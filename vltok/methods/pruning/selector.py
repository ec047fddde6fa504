"""Selector, the base of the training-free methods that keep some of the visual tokens of every image and video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from vltok.checks import check_choice, check_one_budget, check_regions
from vltok.edits import Edits
from vltok.method import Method, Run
from vltok.methods.pruning.merging import merge_into_kept
from vltok.methods.pruning.regions import part_of, region_places, region_quotas
from vltok.tokens import Grid3, gather_tokens, keep_count
from vltok.views import LanguageView
from vltok.visual import AttentionRequest, Need, Selection, VisualTokens


@dataclass(frozen=True)
class Selector(Method):
    """Keep some visual tokens of every image and video before the language model and drop the rest.

    A selector defines `select`, a pure function of the visual tokens; embeddings, masks, positions, cache and labels
    are the engine's work. What it looks at besides embeddings it names in `needs`, and by `attention_request`.

    Attributes:
        keep_ratio: Share of each image's visual tokens to keep, in (0, 1]. Exactly one of keep_ratio and num_keep.
        num_keep: Number of visual tokens to keep per image, at least 1.
        positions: "keep" leaves the kept tokens their rotary positions, "reindex" counts them anew without gaps,
            "stretch" spreads those kept of a run of tokens evenly over the positions of this run.
        per: What has a budget of its own: an "image", with all its tiles, or a whole video; each "tile" of an image;
            each "frame" of a video. Tokens that tell no tiles or frames apart have a common budget.
        merge: "nearest" averages each dropped token into the kept one that it is most like; None drops it.
        regions: Regions (down, across) of the grid that have equal shares of the budget, each asked about alone; None
            asks about the whole image.
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    keep_ratio: float | None = None
    num_keep: int | None = None
    positions: Literal["keep", "reindex", "stretch"] = "keep"
    per: Literal["image", "tile", "frame"] = field(default="image", kw_only=True)
    merge: Literal["nearest"] | None = field(default=None, kw_only=True)
    regions: tuple[int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_one_budget(type(self).__name__, self.keep_ratio, self.num_keep)
        check_choice("positions", self.positions, ("keep", "reindex", "stretch"))
        check_choice("per", self.per, ("image", "tile", "frame"))
        check_choice("merge", self.merge, (None, "nearest"))
        if self.regions is not None:
            object.__setattr__(self, "regions", check_regions("regions", self.regions))

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `select` looks at besides embeddings and attention, see `VisualTokens`: nothing by default."""
        return ()

    @property
    def merges(self) -> bool:
        """Whether kept tokens are changed; then `select` runs with gradients. By default if `merge` says so.

        It must be True where `select` returns embeddings or features.
        """
        return self.merge is not None

    def attention_request(self, has_cls: bool) -> AttentionRequest | None:
        """Say which attention of the vision tower `select` needs; none by default.

        Args:
            has_cls: Whether the vision tower has a [CLS] token.
        """
        return None

    def budget(self, num_tokens: int, grid: Grid3 | None, kind: Literal["image", "video"]) -> int:
        """Say how many visual tokens of an image or video are kept.

        Args:
            num_tokens: How many it has, N.
            grid: Frames, rows and columns of these, if they form a grid.
            kind: What it is.

        Returns:
            The count, in 1..N.
        """
        return keep_count(num_tokens, self.keep_ratio, self.num_keep)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor | Selection:
        """Pick tokens, a pure function.

        Args:
            visual: The visual tokens of B images of N tokens each.
            num_keep: How many to keep, in 1..N.

        Returns:
            Kept positions, (B, num_keep), ascending, int64; or a `Selection`, of what stands there instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select()")

    def pick(self, visual: VisualTokens, num_keep: int) -> Selection:
        """Do what the engine asks of a selector: `select`, in each region if there are some, then `merge` if wanted.

        Args:
            visual: The visual tokens of B images of N tokens each.
            num_keep: How many to keep, in 1..N.

        Returns:
            Kept positions, (B, num_keep), ascending, and what stands there, if that is something else.

        Raises:
            UnsupportedInputError: If there are regions, and the tokens form no grid.
            ValueError: If dropped tokens are to be merged by a selector that merges them by itself.
        """
        selection = self._select(visual, num_keep) if self.regions is None else self._by_regions(visual, num_keep)
        if self.merge is None:
            return selection
        if selection.embeddings is not None or selection.features is not None:
            raise ValueError(f"{type(self).__name__} merges tokens by itself; leave out merge={self.merge!r}")
        return Selection(selection.indices, merge_into_kept(visual.embeddings, selection.indices))

    def _select(self, visual: VisualTokens, num_keep: int) -> Selection:
        selection = self.select(visual, num_keep)
        return selection if isinstance(selection, Selection) else Selection(selection)

    def _by_regions(self, visual: VisualTokens, num_keep: int) -> Selection:
        places = region_places(visual, self.regions)
        quotas = region_quotas([len(each) for each in places], num_keep)
        parts = [
            (where, self._select(part_of(visual, where), quota))
            for where, quota in zip(places, quotas, strict=True)
            if quota
        ]
        indices, order = torch.cat([where[part.indices] for where, part in parts], 1).sort(1)
        content = {
            name: gather_tokens(torch.cat([_content(visual, name, *part) for part in parts], 1), order)
            for name in ("embeddings", "features")
            if any(getattr(part, name) is not None for _, part in parts)
        }
        return Selection(indices, **content)

    def attach(self, view: LanguageView, edits: Edits, run: Run) -> None:
        view.on_visual_tokens(edits, run, self)


def _content(visual: VisualTokens, name: str, where: torch.Tensor, part: Selection) -> torch.Tensor:
    """What stands in the place of the tokens kept of a region, (B, K, ...): they themselves if the part doesn't say."""
    given = getattr(part, name)
    return gather_tokens(getattr(visual, name)[:, where], part.indices) if given is None else given
