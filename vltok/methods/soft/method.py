"""SOFT: replace the attention of a ViT by softmax-free attention, whose cost is linear in the number of patches.

Papers: https://arxiv.org/abs/2110.11945, https://arxiv.org/abs/2207.03341. Needs training: a model computes something
else with it. Differs from the papers: it goes into a ViT that exists, and starts from that one's projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vltok.checks import Blocks, check_blocks, check_choice, check_integer, chosen_blocks
from vltok.edits import Edits
from vltok.kernels.gaussian_mix import BACKENDS
from vltok.method import Method, Run, register
from vltok.methods.soft.attention import SoftmaxFreeAttention
from vltok.methods.soft.inverse import STEPS
from vltok.report import LinearAttention
from vltok.views import SelfAttention, VisionHost

Init = Literal["mean", "query", "key", "random"]
LANDMARKS = 7  # along a side, as in the papers
LINEAR = 3.0  # GELU is linear to 1 % from here on
LARGEST_CONV = 9  # released; a larger one would cost more than the attention


@register("soft")
@dataclass(frozen=True)
class SOFT(Method):
    """Attend without softmax, at linear cost, in a vision tower. Not training-free: fine-tune it, or load its weights.

    Attributes:
        ratio: Side of the region of patches that becomes one landmark, at most the shorter side of the grid. By default
            about 7 x 7 landmarks.
        conv_size: Side of the convolution of the values, odd. By default as released, 3, 5 and 9 for ratios 2, 4 and 8;
            not larger for larger ratios.
        normalize: Normalise by the landmarks' row sums (SOFT-Norm), which generalises better.
        blocks: Which blocks, as (start, stop) of a Python range: (0, 6) the first six, (-2, None) the last two. All by
            default.
        init: Which pretrained projection the shared one of queries and keys starts from: "query", "key" or their
            "mean". Values and output start from the pretrained ones. "random" starts anew.
        newton_iters: Newton steps for the inverse.
        backend: What computes the kernel products: "auto", "torch" or "triton".
    """

    training_free: ClassVar[bool] = False

    ratio: int | None = None
    conv_size: int | None = None
    normalize: bool = True
    blocks: Blocks | None = None
    init: Init = "mean"
    newton_iters: int = STEPS
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("ratio", "conv_size", "newton_iters"):
            value = getattr(self, name)
            if value is not None or name == "newton_iters":
                check_integer(name, value, least=1)
        if self.conv_size is not None and self.conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, so that the convolution keeps the grid; got {self.conv_size}")
        check_choice("init", self.init, Init)
        check_choice("backend", self.backend, BACKENDS)
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def settled(self, view: VisionHost) -> SOFT:
        vision = view.vision
        side = min(vision.grid)
        ratio = self.ratio or max(2, round(side / LANDMARKS))
        if ratio > side:
            raise ValueError(
                f"ratio={ratio} is larger than this vision tower's grid of {vision.grid[0]} x {vision.grid[1]} "
                f"patches; use at most {side}"
            )
        conv_size = self.conv_size or min(2 * (ratio // 2) + 1, LARGEST_CONV)
        return replace(self, ratio=ratio, conv_size=conv_size, blocks=chosen_blocks(self.blocks, vision.depth))

    def attach(self, view: VisionHost, edits: Edits, run: Run) -> None:
        vision, method = view.vision, self.settled(view)
        blocks = range(*method.blocks)
        if any(isinstance(vision.attention_module(block), SoftmaxFreeAttention) for block in blocks):
            raise ValueError(
                "attention in these blocks is already softmax-free; remove that handle first, or choose other blocks"
            )
        for block, old in [(block, vision.self_attention(block)) for block in blocks]:
            attention = SoftmaxFreeAttention(
                vision.dim,
                old.num_heads,
                method.ratio,
                method.conv_size,
                self.normalize,
                self.newton_iters,
                vision.num_prefix_tokens,
                self.backend,
            )
            if self.init != "random":
                start_from_softmax(attention, old, self.init, math.prod(vision.grid))
            weight = old.out[0]
            vision.swap_attention(edits, block, attention.to(weight.device, weight.dtype))
        landmarks = math.prod(-(-side // method.ratio) for side in vision.grid)
        run.fact("attention", LinearAttention(method.blocks, math.prod(vision.grid), landmarks))


@torch.no_grad()
def start_from_softmax(attention: SoftmaxFreeAttention, old: SelfAttention, init: Init, num_patches: int) -> None:
    """Set weights so that softmax-free attention begins near the softmax attention it replaces.

    Landmarks begin as averages of the queries of their region: the convolution averages, and all queries are shifted by
    what takes the landmarks, after their layer norm, to where GELU is linear; the kernel sees differences alone. Values
    are scaled down by what a sum over equal tokens is more than their mean. The convolution of values begins at 0.

    Args:
        attention: Freshly made.
        old: What it replaces.
        init: Where queries and keys start: "query", "key" or "mean".
        num_patches: Patches of a picture.
    """
    sources = {"query": (old.query,), "key": (old.key,), "mean": (old.query, old.key)}[init]
    weight, bias = (sum(part) / len(sources) for part in zip(*map(_filled, sources), strict=True))
    inner, width = attention.attn, attention.dim // attention.num_heads
    spread = (weight.norm() / attention.dim**0.5 / width**0.25).item()  # of a query's channels, for inputs of spread 1
    shift = LINEAR * (1 + spread)
    attention.W_q.weight.copy_(weight)
    attention.W_q.bias.copy_(bias + shift * width**0.25)
    inner.Qlandmark_op.weight.copy_(torch.eye(width)[:, :, None, None] / inner.ratio**2)
    inner.Qnorm_act[0].weight.fill_(spread)
    inner.Qnorm_act[0].bias.fill_(shift)
    inner.conv.weight.zero_()
    share = 1 / inner.ratio**2 if inner.normalize else 1 / num_patches
    weight, bias = _filled(old.value)
    attention.W_v.weight.copy_(weight * share)
    attention.W_v.bias.copy_(bias * share)
    for own, part in zip((attention.ff.weight, attention.ff.bias), _filled(old.out), strict=True):
        own.copy_(part)


def _filled(projection: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = projection
    weight = weight.detach().float().cpu()
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float().cpu()
