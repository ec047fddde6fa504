"""What selectors and decoder rules see of visual tokens, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vltok.tokens import Grid3

AttentionKind = Literal["cls", "received"]


@dataclass(frozen=True)
class AttentionRequest:
    """Which attention of the vision tower a selector wants to see.

    Attributes:
        kind: "cls" is the attention of the [CLS] query over the patches; "received" is what a patch receives from all
            queries together, 1 on average. Both are means over the heads, and of a token over its patches, and are
            not renormalised.
        layer: Layer of the vision tower, counted as a Python index (-1 is the last one).
    """

    kind: AttentionKind
    layer: int = -1


# What a selector may ask for besides: see `VisualTokens`.
Need = Literal["features", "keys", "text", "clip"]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images of N tokens each, as they enter the language model.

    Where a selector changes what the kept tokens are, gradients flow through all that is given here in floating point,
    but for attention and what is in CLIP's space.

    Attributes:
        embeddings: Projected embeddings, (B, N, D), in the model's dtype.
        image_keys: A number made from each image's pixels alone, (B,), int64, the same in any batch. Seeds whatever a
            selector wants to be random.
        attention: The requested attention, (B, N), float32, -inf where a token stands for no patch (such as the newline
            tokens of AnyRes layouts). None if nothing was requested.
        is_overview: True for tokens of the whole image, (B, N), bool; False for those of AnyRes crops.
        grid: Frames, rows and columns (T, H, W) that the first T * H * W tokens form, row by row; None where they form
            none that is known.
        coordinates: Frame, row and column of each token, (B, N, 3), int64, -1 for tokens behind the grid; None without
            a grid.
        features: What the vision tower says of each token, (B, N, C), the mean over the patches it stands for, 0 where
            it stands for none. None unless asked for.
        can_project: Whether these are what the projector reads, token by token, so that a `Selection` may have features
            in their place.
        keys: The keys by which the layer attends whose attention was requested, (B, N, C), all heads side by side, with
            its norms and rotary positions: the mean over the patches, 0 for none. None unless asked for.
        num_heads: How many heads these are of.
        text: Embeddings of the words of the question, (B, M, D): those of the language model. Answers are never among
            them. None unless asked for.
        text_mask: Which of these are no padding, (B, M), bool.
        clip_image: The features in CLIP's space, (B, N, E), float32, 0 where a token stands for no patch. None unless
            "clip" is asked for, which asks for features, too.
        clip_text: The question in CLIP's space, (B, E), float32: the mean of the unit embeddings of its segments, which
            have at most as many words as CLIP's text tower reads; 0 for a question without words.
    """

    embeddings: torch.Tensor
    image_keys: torch.Tensor
    attention: torch.Tensor | None
    is_overview: torch.Tensor
    grid: Grid3 | None = None
    coordinates: torch.Tensor | None = None
    features: torch.Tensor | None = None
    can_project: bool = False
    keys: torch.Tensor | None = None
    num_heads: int | None = None
    text: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    clip_image: torch.Tensor | None = None
    clip_text: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """What a selector keeps, where it changes what stands there. At most one of embeddings and features is given.

    Either needs a selector whose `merges` is True, so that gradients flow.

    Attributes:
        indices: Kept positions, (B, K), ascending, int64.
        embeddings: What enters the language model at these, (B, K, D).
        features: What the projector is given for these, (B, K, C); where a token stands for no patch, such as a newline
            token, it stays as it is. Only where `VisualTokens.can_project`.
    """

    indices: torch.Tensor
    embeddings: torch.Tensor | None = None
    features: torch.Tensor | None = None


class TokenSelector(Protocol):
    """What `LanguageView.on_visual_tokens` needs of a method. `vltok.Selector` is its base class."""

    keep_ratio: float | None
    num_keep: int | None
    positions: Literal["keep", "reindex", "stretch"]
    per: Literal["image", "tile", "frame"]

    @property
    def needs(self) -> tuple[Need, ...]: ...

    @property
    def merges(self) -> bool: ...

    def attention_request(self, has_cls: bool) -> AttentionRequest | None: ...

    def budget(self, num_tokens: int, grid: Grid3 | None, kind: Literal["image", "video"]) -> int: ...

    def pick(self, visual: VisualTokens, num_keep: int) -> Selection: ...


@dataclass(frozen=True)
class Entry:
    """A prompt as it entered the decoder, for N samples of P tokens each.

    Attributes:
        embeddings: What entered, (N, P, D).
        is_visual: Which of them were visual tokens of the sample, (N, P), bool.
        is_text: Which were text of the sample's prompt behind its first visual token, (N, P), bool.
        slots: Where each token that is still there stood then, (N, S), int64.
    """

    embeddings: torch.Tensor
    is_visual: torch.Tensor
    is_text: torch.Tensor
    slots: torch.Tensor


class DecoderState(Protocol):
    """What a decoder rule sees of a prompt at one layer, each thing computed when it is asked for.

    There is one row for each of N samples: a row of the batch, or one of several samples packed into a row. All are
    shown the S tokens that are still there. Answers that training looks at, and what a draft model guessed, are not
    prompt.

    Attributes:
        layer: The decoder layer, counted from 1.
        num_layers: Layers of the decoder.
        is_visual: Which of them are visual tokens of the sample, (N, S), bool.
        is_text: Which are text of the sample's prompt behind its first visual token, (N, S), bool.
        last: The last token of the sample's prompt, (N,), int64: what the first word of the answer is read from.
        images: Which image of its row a visual token is of, counted from 0, (N, S), int64; -1 for other tokens.
        image_lengths: For each sample, the visual tokens of each image of its row that entered the decoder. Shares are
            counted of these at every layer.
        grids: For each sample, frames, rows and columns that the tokens of each image of its row formed before any
            left; None where they are not known.
        coordinates: Frame, row and column of each visual token, (N, S, 3), int64; -1 for other tokens, for those behind
            the grid, and where there is none.
        entry: The prompt as it entered the decoder.
        hidden_states: What the layer's attention looks at, (N, S, D).
        keys: The keys of the layer as attention gets them, (N, S, C), all heads side by side.
        mass: What share of its attention each token puts on these visual and on these text tokens, (N, S, 2), float32,
            mean over the heads, read from the attention's own queries and keys.
    """

    layer: int
    num_layers: int

    @property
    def is_visual(self) -> torch.Tensor: ...

    @property
    def is_text(self) -> torch.Tensor: ...

    @property
    def last(self) -> torch.Tensor: ...

    @property
    def images(self) -> torch.Tensor: ...

    @property
    def image_lengths(self) -> Sequence[Sequence[int]]: ...

    @property
    def grids(self) -> Sequence[Sequence[Grid3 | None]]: ...

    @property
    def coordinates(self) -> torch.Tensor: ...

    @property
    def entry(self) -> Entry: ...

    @property
    def hidden_states(self) -> torch.Tensor: ...

    @property
    def keys(self) -> torch.Tensor: ...

    @property
    def mass(self) -> torch.Tensor: ...

    def attention(self, queries: torch.Tensor) -> torch.Tensor:
        """The attention of some tokens over all that are still there, exact for any kernel, window or rotary embedding.

        Args:
            queries: Which tokens, (N, Q), int64.

        Returns:
            (N, Q, S), float32, mean over the heads. Rows sum to less than 1 where tokens of earlier calls are seen.
        """

    def record(self, alpha_tv: torch.Tensor, alpha_vt: torch.Tensor, dropped: torch.Tensor) -> None:
        """Leave both attention ratios and the decision for the report, (N,) each."""


class TokenRule(Protocol):
    """What `LanguageView.on_decoder_layers` needs of a method. `vltok.DecoderRule` is its base class.

    `layers` counts decoder layers: l means that it is asked after the attention of the l-th, for the layers behind it.
    """

    def layers(self, num_layers: int) -> tuple[int, ...]: ...

    def keep(self, state: DecoderState) -> torch.Tensor:
        """Which tokens go on, (N, S), bool. Only visual tokens can leave."""
