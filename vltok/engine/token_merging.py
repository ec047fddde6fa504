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
from typing import Any

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.parts import num_heads, score_layers, split_arguments
from vltok.engine.tower_call import Merged, TowerCall, TowerCalls, tokens_in
from vltok.engine.watchers import AttentionListener
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.method import Run
from vltok.recompute import is_recomputing
from vltok.report import Merging
from vltok.tokens import mean_by_group, spread_to_group
from vltok.views import TokenMerger

_MASKS = ("attention_mask", "attn_mask")
_TAKE_BIAS = ("eager", "sdpa")  # attention functions that add a mask to products as it is


class _Frame:
    """A block between its attention and the end of its MLP.

    Attributes:
        groups: The merged token that each one goes into, (B, N); None where too few enter to merge any.
        sizes: How many tokens each of these stands for, (B, N), float32.
        left: How many tokens are left.
        outer: The same block, where it runs for a call inside which this one runs.
    """

    __slots__ = ("groups", "left", "outer", "sizes")

    def __init__(self, groups: torch.Tensor | None, sizes: torch.Tensor, left: int, outer: _Frame | None) -> None:
        self.groups = groups
        self.sizes = sizes
        self.left = left
        self.outer = outer


class BlockMerger(AttentionListener):
    """Merges tokens in one block, and has its attention count each token as often as it stands for.

    What it decides is left with the call, where a backward pass that recomputes the block finds it. Hooks on the block
    itself don't run then in some versions of transformers, those on its parts do.

    Args:
        calls: Finds the calls of the tower.
        number: The block's number.
        block: The block.
        attention: Its attention.
        num_merge: How many tokens it merges away, at most half of the patches.
        num_prefix_tokens: Tokens before the patches.
        merger: Who says which.
        before: Number of the last block before it that merges, None if none does.
        run: Where to leave what became of the patches; None unless this block is the last one that merges.

    Raises:
        UnsupportedModelError: If the attention doesn't say where its keys are, or takes no mask where it needs one.
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
        before: int | None,
        run: Run | None,
    ) -> None:
        names = list(inspect.signature(type(attention).forward).parameters)[1:]
        mask = next((name for name in _MASKS if name in names), None)
        if score_layers(attention) is None or not num_heads(attention):
            raise UnsupportedModelError(
                f"{type(attention).__name__}, block {number} of this vision tower, shows no keys to compare tokens by, "
                "as the attention of CLIP, SigLIP, ViT and DINOv2 of transformers and of most ViTs of timm does; "
                "tokens can't be merged here"
            )
        if mask is None and merger.proportional:
            raise UnsupportedModelError(
                f"{type(attention).__name__}, block {number} of this vision tower, takes no mask, by which merged "
                "tokens count for several; set proportional=False, or try a newer version of what defines it"
            )
        super().__init__(calls, number, block, num_heads(attention))
        self.num_merge = num_merge
        self.num_prefix_tokens = num_prefix_tokens
        self.merger = merger
        self.before = before
        self.run = run
        self.mask, self.place = mask, len(names) if mask is None else names.index(mask)

    def install_around(self, edits: Edits, attention: nn.Module, norm: nn.Module, mlp: nn.Module) -> None:
        """Put the hooks on the block and its parts."""
        if self.num_merge:
            self.install(edits, attention)
            edits.before(norm, self.merge)
            edits.after(mlp, self.spread)
            edits.after(self.owner, self.leave, first=True)
        edits.before(attention, self.weigh)

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
        if self.before is None:
            return None
        tokens = tokens_in(args, kwargs)
        bias = self._merged_before(tokens).sizes.log().to(tokens.dtype)[:, None, None]
        if len(args) > self.place:
            return (*args[: self.place], bias, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.mask: bias}

    def show(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the attention: match tokens by its keys."""
        scores = self.close()
        if output is None:  # it raised
            return
        self.check_heard(attention, scores)
        tokens = tokens_in(args, kwargs)
        length = tokens.shape[1]
        num_merge = min(self.num_merge, (length - self.num_prefix_tokens) // 2)
        before = None if self.before is None else self._merged_before(tokens)
        sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if before is None else before.sizes
        merged = self._merged_in(tokens)
        if merged is None or not is_recomputing():
            keys = self._by_heads(scores.key.detach(), tokens).float().mean(1)
            groups = self.merger.groups(keys, num_merge, self.num_prefix_tokens)
            total = sizes.new_zeros(len(sizes), length - num_merge).scatter_add(1, groups, sizes)
            merged = Merged(groups, total, groups if before is None else groups.gather(1, before.source))
            self._call_of(tokens).merged[self.number] = merged
        outer = getattr(self._thread, "frame", None)
        if outer is not None:
            outer.outer = None  # one inside another is as deep as it goes; more were broken off
        self._thread.frame = _Frame(merged.groups if num_merge > 0 else None, sizes, length - num_merge, outer)

    def merge(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the second norm: hand it merged tokens."""
        frame = self._thread.frame
        if frame.groups is None:
            return None
        return (mean_by_group(args[0], frame.groups, frame.sizes, frame.left), *args[1:]), kwargs

    def spread(self, mlp: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        """After the MLP: give back what it made of a merged token to all that went into it."""
        frame = self._thread.frame
        self._thread.frame = frame.outer
        return output if frame.groups is None else spread_to_group(output, frame.groups)

    def leave(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the block: merge what leaves it."""
        entered = tokens_in(args, kwargs)
        tokens, *rest = output if isinstance(output, tuple) else (output,)
        merged = self._merged_in(entered).to(tokens.device)
        if self.run is not None and not is_recomputing():
            prefix = self.num_prefix_tokens
            self.run.report("merging", Merging(source=merged.source[:, prefix:] - prefix))
        if merged.sizes.shape == merged.groups.shape:  # none were merged
            return output
        sizes = torch.ones_like(merged.groups, dtype=torch.float32)
        if self.before is not None:
            sizes = self._merged_before(entered).sizes.to(tokens.device)
        left = mean_by_group(tokens, merged.groups, sizes, merged.sizes.shape[1])
        return (left, *rest) if isinstance(output, tuple) else left

    def _call_of(self, tokens: torch.Tensor) -> TowerCall:
        call = self.calls.call_of(tokens)
        if call is None:
            raise self._unknown(tokens)
        return call

    def _merged_in(self, tokens: torch.Tensor) -> Merged | None:
        """How this block merged tokens that enter it, if it has done so."""
        merged = self._call_of(tokens).merged.get(self.number)
        return None if merged is None or merged.groups.shape != tokens.shape[:2] else merged

    def _merged_before(self, tokens: torch.Tensor) -> Merged:
        """How tokens that enter this block were merged last."""
        merged = self._call_of(tokens).merged.get(self.before)
        if merged is None or merged.sizes.shape != tokens.shape[:2]:
            raise self._unknown(tokens)
        return merged.to(tokens.device)

    def _unknown(self, tokens: torch.Tensor) -> UnsupportedInputError:
        return UnsupportedInputError(
            f"{tokens.shape[1]} tokens came into block {self.number} of this vision tower, and nothing tells what they "
            "were merged from: they didn't come from the block before, or were copied or moved since; call the whole "
            "tower, with images, and turn gradient checkpointing off if it is on"
        )


def is_merging(part: nn.Module) -> bool:
    """Whether tokens are merged in a vision tower in this part of a model."""
    hooks = (hook for module in part.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), BlockMerger) for hook in hooks)
