"""What a method may ask of a model: protocols without an implementation.

A family (vltok/families) implements them for one kind of model; a method (vltok/methods) uses nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from vltok.visual import TokenRule, TokenSelector

if TYPE_CHECKING:
    from vltok.edits import Edits
    from vltok.method import Run


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
