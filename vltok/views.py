"""What a method may ask of a model: protocols without an implementation.

A family (vltok/families) implements them for one kind of model; a method (vltok/methods) uses nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

from vltok.tokens import Grid3

if TYPE_CHECKING:
    from vltok.edits import Edits
    from vltok.method import Run

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
        is_overview: True for tokens of the whole picture, (B, N), bool; False for those of AnyRes crops.
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


@dataclass(frozen=True)
class ProjectorSite:
    """Where the projector of a vision-language model stands, for a method that puts another in its place.

    Attributes:
        old: The projector in place.
        layers: Its two linear layers, if it is linear, exact GELU, linear; else None.
        grid: Patches of one picture (or crop) of the vision tower, (H, W), prefix tokens not counted.
        dim: Width of the vision tower, C.
        hidden: Width of the language model, D.
        depth: Layers of the vision tower; hidden state 0 is its embeddings, `depth` its last layer.
        levels: Hidden states that the old projector reads, in 0..depth.
    """

    old: nn.Module
    layers: tuple[nn.Linear, nn.Linear] | None
    grid: tuple[int, int]
    dim: int
    hidden: int
    depth: int
    levels: tuple[int, ...]


class ScaleChoice(Protocol):
    """The scale factors that a projector was made for, and which one counts."""

    @property
    def every(self) -> tuple[int, ...]:
        """All of them. The first counts where nothing else is said."""

    @property
    def now(self) -> int:
        """The one that counts for the calls of this thread, see `handle.using`."""

    def at(self, scale_factor: int) -> AbstractContextManager[None]:
        """Let one of them count for this thread in a block.

        Raises:
            ValueError: If it is none of them.
        """


Projection = tuple[torch.Tensor, torch.Tensor | None]  # weight (out, in) and bias (out,) of a linear layer


@dataclass(frozen=True)
class SelfAttention:
    """The self-attention of one block of a vision tower, for a method that puts another in its place.

    Attributes:
        module: The module in place.
        num_heads: Attention heads; each has C / num_heads channels, in order.
        query, key, value, out: Its projections, all C -> C. None where it has none, as after a swap.
    """

    module: nn.Module
    num_heads: int
    query: Projection
    key: Projection
    value: Projection
    out: Projection


class ScoreWatcher(Protocol):
    """What `VisionView.watch_scores` needs of a method.

    `call` is one and the same object while a batch of pictures passes through the tower, and another for each batch;
    None where nothing tells.
    """

    def start(self, call: object) -> None:
        """Pictures enter the tower."""

    def see(self, call: object, block: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        """A block attends by softmax(scale * query key^T), in each picture apart.

        Pictures of one size are a pair (query, key), both (B, heads, N, d), with their graphs.
        """

    def see_map(self, call: object, block: int, attention: torch.Tensor) -> None:
        """A block, whose queries and keys are not the whole story, attends by these probabilities, (B, heads, N, N)."""

    def drop(self, call: object) -> None:
        """A block raised, so that the pictures go no further."""

    def finish(self, call: object) -> None:
        """The last block is done."""


class TokenMerger(Protocol):
    """What `MergingView.merge_tokens` needs of a method.

    Attributes:
        proportional: Whether attention counts a merged token as often as it stands for.
    """

    @property
    def proportional(self) -> bool: ...

    def groups(self, keys: torch.Tensor, num_merge: int, num_prefix_tokens: int) -> torch.Tensor:
        """Say which tokens become one.

        Args:
            keys: By which tokens attend, mean over the heads, (B, N, d), float32.
            num_merge: How many tokens are to be merged away, at most half of the patches.
            num_prefix_tokens: Tokens before the patches, each of which must stay alone.

        Returns:
            The number of the token that each one goes into, (B, N), int64; 0..N - num_merge - 1 all come up, and prefix
            tokens stay in their places.
        """


class VisionView(Protocol):
    """A vision tower as a method sees it: a stack of blocks over prefix tokens and a grid of patches.

    Attributes:
        dim: Width, C.
        depth: Number of blocks.
        grid: Patches of a picture of the size the tower was made for, (H, W).
        num_prefix_tokens: Tokens before the patches, such as [CLS] and registers.
    """

    dim: int
    depth: int
    grid: tuple[int, int]
    num_prefix_tokens: int

    def attention_module(self, block: int) -> nn.Module:
        """The module that attends in a block, counted from 0.

        Raises:
            UnsupportedModelError: If the block has none that vltok knows.
        """

    def self_attention(self, block: int) -> SelfAttention:
        """Take apart the self-attention of a block.

        Raises:
            UnsupportedModelError: If it is more than softmax over scaled products of four projections' results.
        """

    def swap_attention(self, edits: Edits, block: int, module: nn.Module) -> None:
        """Put `module` in the place of a block's attention, to be called as `module(x, grid)`.

        It gets normalised tokens, (B, N, C), and the grid of the pictures at hand, and returns (B, N, C).

        Raises:
            UnsupportedModelError: If patches are dropped on the way.
            ValueError: If another method is watching the attention.
        """

    def pool_before_attention(self, edits: Edits, block: int, name: str, module: nn.Module) -> None:
        """Add `module` to a block as its child `name`, and let what attends see its tokens in place of the block's.

        It is called as `module(x, grid)` with the tokens that enter the block, (B, N, C), before they are normalised,
        and returns (B, N, C). Where pictures of several sizes come together it is called for each size, with the tokens
        of these pictures alone. The residual path goes around it. It is moved to where the block's weights are.

        Raises:
            UnsupportedModelError: If the block doesn't normalise, attend and add, in this order, its weights are not at
                hand, or patches are dropped on the way.
            EditConflictError: If the block has a child of that name.
        """

    def watch_scores(self, edits: Edits, blocks: Sequence[int], watcher: ScoreWatcher) -> None:
        """Show `watcher` the queries and keys, or the attention maps, of some blocks, in train mode.

        Raises:
            UnsupportedModelError: If the attention of a block is not softmax over products of queries and keys, and
                shows no map.
        """


class VisionHost(Protocol):
    """A model that has a vision tower, or is one."""

    @property
    def vision(self) -> VisionView:
        """The vision tower.

        Raises:
            UnsupportedModelError: If it is not one whose blocks vltok knows.
        """


class MergingView(VisionHost, Protocol):
    """A model whose vision tower may hand on fewer tokens than it gets."""

    def merging_blocks(self) -> int:
        """How many blocks, from the first, have a say in what the tower hands on.

        Raises:
            UnsupportedModelError: If what reads the tower needs a grid.
        """

    def merge_tokens(self, edits: Edits, run: Run, merges: Sequence[int], merger: TokenMerger) -> None:
        """Merge tokens in each block between attention and MLP, at most half of the patches that enter it.

        In a vision-language model the processor writes as many placeholders as there are patches left from then on.

        Args:
            edits: The ledger of the handle.
            run: Where to leave what became of the patches, as "merging".
            merges: How many to merge away, for each block of the tower.
            merger: Who says which.

        Raises:
            UnsupportedModelError: If the tower tells its attention more than tokens, blocks are in another order, or
                what reads the tower needs a grid.
            ValueError: If another method needs all tokens, or the processor is missing or doesn't belong to the model.
        """


class ProjectorView(Protocol):
    """A vision-language model as a method sees it that condenses visual tokens in the projector."""

    def projector_site(self) -> ProjectorSite:
        """Say where the projector stands.

        Raises:
            UnsupportedModelError: If this model's projector can't be replaced.
        """

    def swap_projector(
        self, edits: Edits, run: Run, projector: nn.Module, levels: tuple[int, ...], scales: ScaleChoice
    ) -> None:
        """Put `projector` in the place of the old one.

        It gets the hidden states `levels` concatenated on channels, (B, N, len(levels) * C), and returns
        (B, N / scale_factor^2, D). The model's processor writes that many placeholders from then on. Where there are
        several scale factors, it is told the one that counts as a keyword, `scale_factor`.

        Raises:
            ValueError: If there is no processor, or it doesn't belong to the model.
        """


class LanguageView(Protocol):
    """A vision-language model as a pruning method sees it."""

    def on_visual_tokens(self, edits: Edits, run: Run, selector: TokenSelector) -> None:
        """Let `selector` choose which visual tokens of every image enter the language model."""

    def on_decoder_layers(self, edits: Edits, run: Run, rule: TokenRule) -> None:
        """Let `rule` decide which visual tokens leave inside the decoder."""
