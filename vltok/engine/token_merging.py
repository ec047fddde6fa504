"""Merging tokens inside a block of a vision tower, between attention and MLP, by hooks alone.

A block is x + attention(norm1(x)), then x + mlp(norm2(x)). A hook can hand fewer tokens to norm2 and the MLP, but not
to the residual path around them. So what the MLP returns goes back to all tokens, and the block's output is merged:

    mean(x + back(mlp(norm2(mean(x))))) = mean(x) + mlp(norm2(mean(x)))    as all of a group get the same from the MLP

    block input       a b c d     sizes 1 1 1 1     attention, keys -> groups 0 1 0 2
    norm2, MLP        A b d       A = (a + c) / 2
    residual path     a b c d     + A' b' A' d'
    block output      A b d       sizes 2 1 1, whose logarithm the next attention adds to its products
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.parts import num_heads, score_layers, split_arguments
from vltok.engine.tower_call import Merged, TowerCalls, tokens_in
from vltok.engine.watchers import AttentionListener
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.method import Run
from vltok.recompute import is_recomputing
from vltok.report import Merging
from vltok.tokens import gather_tokens, mean_by_group
from vltok.views import TokenMerger

_MASKS = ("attention_mask", "attn_mask")
_TAKE_BIAS = ("eager", "sdpa")  # attention functions that add a mask to products as it is


class _Frame:
    """A block that runs.

    Attributes:
        before: What the tokens that entered were merged from, None where they weren't.
        groups: The merged token that each one goes into, (B, N), once the block has attended; None where none merge.
        outer: The same block, where it runs for a call inside which this one runs.
    """

    __slots__ = ("before", "groups", "outer")

    def __init__(self, outer: _Frame | None) -> None:
        self.before: Merged | None = None
        self.groups: torch.Tensor | None = None
        self.outer = outer


class BlockMerger(AttentionListener):
    """Merges tokens in one block, and has its attention count each token as often as it stands for.

    Args:
        calls: Finds the calls of the tower.
        number: The block's number.
        block: The block.
        attention: Its attention.
        num_merge: How many tokens it merges away, at most half of the patches.
        num_prefix_tokens: Tokens before the patches.
        merger: Who says which.
        is_first: Whether no block merged before.
        run: Where to leave what became of the patches; None unless this block is the last one that merges.

    Raises:
        UnsupportedModelError: If the attention doesn't say where its keys are, or takes no mask.
    """

    def __init__(
        self,
        calls: TowerCalls,
        number: int,
        block: nn.Module,
        attention: nn.Module,
        num_merge: int,
        num_prefix_tokens: int,
        merger: TokenMerger,
        is_first: bool,
        run: Run | None,
    ) -> None:
        names = list(inspect.signature(type(attention).forward).parameters)[1:]
        mask = next((name for name in _MASKS if name in names), None)
        if mask is None or score_layers(attention) is None or not num_heads(attention):
            raise UnsupportedModelError(
                f"{type(attention).__name__}, block {number} of this vision tower, shows no keys to compare tokens by, "
                "or takes no mask by which merged tokens count for several, as the attention of CLIP, SigLIP, ViT and "
                "DINOv2 of transformers and of most ViTs of timm does; tokens can't be merged here"
            )
        super().__init__(calls, number, block, num_heads(attention))
        self.num_merge = num_merge
        self.num_prefix_tokens = num_prefix_tokens
        self.merger = merger
        self.is_first = is_first
        self.run = run
        self.mask, self.place = mask, names.index(mask)

    def _start_empty(self) -> None:
        self._thread = threading.local()  # scores, as in the base class; frame: of the block that runs in this thread

    def install_around(self, edits: Edits, attention: nn.Module, norm: nn.Module, mlp: nn.Module) -> None:
        """Put the hooks on the block and its parts."""
        edits.before(self.owner, self.enter)
        if self.num_merge:
            self.install(edits, attention)
            edits.before(norm, self.merge)
            edits.after(mlp, self.spread)
        edits.before(attention, self.weigh)
        edits.after(self.owner, self.leave, always=True, first=True)

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the block."""
        outer = getattr(self._thread, "frame", None)
        if outer is not None:
            outer.outer = None  # one inside another is as deep as it goes; more were broken off
        frame = self._thread.frame = _Frame(outer)
        if self.is_first:
            return
        tokens = tokens_in(args, kwargs)
        call = self.calls.call_of(tokens)
        frame.before = None if call is None else call.merged.get(self.number)
        if frame.before is None or frame.before.sizes.shape != tokens.shape[:2]:
            raise UnsupportedInputError(
                f"{tokens.shape[1]} tokens came into block {self.number} of this vision tower, and nothing tells what "
                "they were merged from: they didn't come from the block before, or were copied or moved since; call "
                "the whole tower, with pictures, and turn gradient checkpointing off if it is on"
            )

    def weigh(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the attention: add the logarithm of the sizes to its products."""
        if others := split_arguments(args, kwargs)[1]:
            raise UnsupportedInputError(
                f"{type(attention).__name__} got {', '.join(others)}, and tokens are merged in this vision tower, "
                "where masks don't fit any more; call it without"
            )
        if not self.merger.proportional:
            return None
        function = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
        if function not in _TAKE_BIAS:
            raise UnsupportedInputError(
                f"attn_implementation={function!r} adds nothing to the products of queries and keys, by which merged "
                'tokens count for several; load the model with attn_implementation="sdpa", or set proportional=False'
            )
        before = self._thread.frame.before
        if before is None:
            return None
        bias = before.sizes.log().to(tokens_in(args, kwargs).dtype)[:, None, None]
        if len(args) > self.place:
            return (*args[: self.place], bias, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.mask: bias}

    def show(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the attention: match tokens by its keys."""
        scores = self.close()
        if output is None:
            return
        self.check_heard(attention, scores)
        tokens = tokens_in(args, kwargs)
        num_merge = min(self.num_merge, (tokens.shape[1] - self.num_prefix_tokens) // 2)
        if num_merge > 0:
            keys = self._by_heads(scores.key.detach(), tokens).float().mean(1)
            self._thread.frame.groups = self.merger.groups(keys, num_merge, self.num_prefix_tokens)

    def merge(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the second norm: hand it merged tokens."""
        tokens, *rest = args
        if self._thread.frame.groups is None:
            return None
        return (self._merged(tokens)[0], *rest), kwargs

    def spread(self, mlp: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        """After the MLP: give back what it made of a merged token to all that went into it."""
        groups = self._thread.frame.groups
        return output if groups is None else gather_tokens(output, groups)

    def leave(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the block: merge what leaves it."""
        frame = self._thread.frame
        if output is None:  # it raised
            self._thread.frame = frame.outer
            return None
        after, result = frame.before, output
        if frame.groups is not None:
            tokens, *rest = output if isinstance(output, tuple) else (output,)
            merged, sizes = self._merged(tokens)
            after = Merged(sizes, frame.groups if after is None else frame.groups.gather(1, after.source))
            result = (merged, *rest) if isinstance(output, tuple) else merged
        self._thread.frame = frame.outer
        call = self.calls.call_of(tokens_in(args, kwargs))
        if call is not None:
            call.merged[self.number + 1] = after
        if self.run is not None and after is not None and not is_recomputing():
            prefix = self.num_prefix_tokens
            self.run.report("merging", Merging(source=after.source[:, prefix:] - prefix))
        return result

    def _merged(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frame = self._thread.frame
        sizes = torch.ones_like(frame.groups, dtype=torch.float32) if frame.before is None else frame.before.sizes
        count = tokens.shape[1] - min(self.num_merge, (tokens.shape[1] - self.num_prefix_tokens) // 2)
        return mean_by_group(tokens, frame.groups, sizes, count)


def is_merging(part: nn.Module) -> bool:
    """Whether tokens are merged in a vision tower in this part of a model."""
    hooks = (hook for module in part.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), BlockMerger) for hook in hooks)
