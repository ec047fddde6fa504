"""Selector, the base of the training-free methods that keep some of the visual tokens of every image and video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from vltok.checks import check_choice, check_one_budget
from vltok.edits import Edits
from vltok.method import Method, Run
from vltok.tokens import Grid3, keep_count
from vltok.views import AttentionRequest, LanguageView, Need, Selection, VisualTokens


@dataclass(frozen=True)
class Selector(Method):
    """Keep some visual tokens of every image and video before the language model and drop the rest.

    A selector defines `select`, a pure function of the visual tokens; embeddings, masks, positions, cache and labels
    are the engine's work. What it looks at besides embeddings it names in `needs`, and by `attention_request`.

    Attributes:
        keep_ratio: Share of each image's visual tokens to keep, in (0, 1]. Exactly one of keep_ratio and num_keep.
        num_keep: Number of visual tokens to keep per image, at least 1.
        positions: "keep" leaves the kept tokens their rotary positions, "reindex" counts them anew without gaps.
        per: What has a budget of its own: an "image", with all its tiles, or a whole video; each "tile" of an image;
            each "frame" of a video. Tokens that tell no tiles or frames apart have a common budget.
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    keep_ratio: float | None = None
    num_keep: int | None = None
    positions: Literal["keep", "reindex"] = "keep"
    per: Literal["image", "tile", "frame"] = field(default="image", kw_only=True)

    def __post_init__(self) -> None:
        check_one_budget(type(self).__name__, self.keep_ratio, self.num_keep)
        check_choice("positions", self.positions, ("keep", "reindex"))
        check_choice("per", self.per, ("image", "tile", "frame"))

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `select` looks at besides embeddings and attention: "features", "keys", "text". Nothing by default."""
        return ()

    @property
    def merges(self) -> bool:
        """Whether `select` changes what kept tokens are; then it runs with gradients. Not by default."""
        return False

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

    def attach(self, view: LanguageView, edits: Edits, run: Run) -> None:
        view.on_visual_tokens(edits, run, self)
