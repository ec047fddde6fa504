"""ToDRE: prune visual tokens by diversity, then by relevance to the task.

Paper: https://arxiv.org/abs/2505.18757. Training-free. No code was released; this follows the text, version 2 (max-sum,
November 2025) by default and version 1 (k-center, May 2025) on request. Differs from the paper: the pivot of a vision
tower without [CLS] token is by default the token nearest to the mean, which needs no random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch

from vltok.checks import check_choice, check_integer, is_number
from vltok.edits import Edits
from vltok.method import Run, register
from vltok.methods.pruning.correction import Correction, needed_by, pick_corrected
from vltok.methods.pruning.floors import position_hash
from vltok.methods.pruning.greedy import float32_products, greedy_order, times_row
from vltok.methods.pruning.rule import layer_at
from vltok.methods.pruning.selector import Selector
from vltok.views import LanguageView
from vltok.visual import AttentionRequest, DecoderState, Need, VisualTokens

Strategy = Literal["max_sum", "k_center"]
Pivot = Literal["auto", "cls", "center", "farthest", "random"]


# Stage 1: diversity, before the language model


def diverse_order(
    tokens: torch.Tensor,
    num_keep: int,
    pivot: torch.Tensor,
    strategy: Strategy = "max_sum",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Like `select_diverse`, with the picks in the order they were made: a smaller budget keeps the first of them."""
    check_choice("strategy", strategy, Strategy)
    return greedy_order(tokens, num_keep, pivot, "sum" if strategy == "max_sum" else "max", weights)


def select_diverse(
    tokens: torch.Tensor,
    num_keep: int,
    pivot: torch.Tensor,
    strategy: Strategy = "max_sum",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pick tokens that are as different from each other as possible, greedily.

    Args:
        tokens: Visual tokens, (B, N, D). Any float dtype; similarity is the cosine in float32.
        num_keep: How many tokens to keep per image, in 1..N.
        pivot: First token of each image, (B,), int64.
        strategy: "max_sum" adds the token with the smallest sum of similarities to those picked, "k_center" the one
            whose largest similarity to those picked is smallest.
        weights: What the distances (1 - similarity) of each token count, (B, N), at least 0; None for 1.

    Returns:
        Kept positions, (B, num_keep), ascending, int64. Ties went to the lowest index.

    Raises:
        ValueError: If `num_keep` or `pivot` is out of range, or an embedding is NaN or infinite. Finding that out is
            the one point where the host waits for the device.
    """
    return diverse_order(tokens, num_keep, pivot, strategy, weights).sort(dim=1).values


@torch.no_grad()
def choose_pivot(
    tokens: torch.Tensor,
    pivot: Pivot = "auto",
    *,
    attention: torch.Tensor | None = None,
    image_keys: torch.Tensor | None = None,
    is_overview: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Choose the first token of each image. The host never waits for the device.

    "cls" is the token with the most [CLS] attention. "center" is the token whose cosine with the mean of the normalised
    tokens is largest, "farthest" the one whose is smallest. "random" depends on the picture and the seed only. "auto"
    is "cls" where attention is given, else "center".

    Args:
        tokens: Visual tokens, (B, N, D).
        pivot: The rule.
        attention: [CLS] attention, (B, N), -inf where a token stands for no patch; for "cls".
        image_keys: A number per image, (B,), int64; for "random".
        is_overview: Tokens of the whole picture, (B, N), bool: the pivot, and the mean, come from them. None, or a row
            without any, stands for all tokens.
        seed: For "random".

    Returns:
        The pivots, (B,), int64; ties go to the lowest index.

    Raises:
        ValueError: If the rule is unknown or what it needs is missing.
    """
    check_choice("pivot", pivot, Pivot)
    batch, length, _ = tokens.shape
    if pivot == "auto":
        pivot = "center" if attention is None else "cls"
    if is_overview is None:
        among = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    else:
        among = is_overview | ~is_overview.any(dim=1, keepdim=True)

    if pivot == "cls":
        if attention is None:
            raise ValueError(
                'pivot="cls" needs the [CLS] attention of the vision tower, (B, N); without it use "center"'
            )
        return attention.masked_fill(~among, -math.inf).argmax(1)
    if pivot == "random":
        if image_keys is None:
            raise ValueError('pivot="random" needs image_keys, a number per image, (B,); without them use "center"')
        return position_hash(image_keys, length, seed).masked_fill(~among, -(2**63)).argmax(1)
    cosine = _cosine_to_mean(tokens, among)
    if pivot == "center":
        return cosine.masked_fill(~among, -math.inf).argmax(1)
    return cosine.masked_fill(~among, math.inf).argmin(1)


def _cosine_to_mean(tokens: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Cosine of each token with the mean of the normalised tokens in `among`, times that mean's length, (B, N)."""
    rows = []
    with float32_products(tokens), torch.autocast(tokens.device.type, enabled=False):
        for x, chosen in zip(tokens, among, strict=True):  # image by image, so that a row doesn't depend on the batch
            x = x.float()
            inverse = torch.linalg.vector_norm(x, dim=1).clamp_min(1e-12).reciprocal()
            mean = (inverse * chosen) @ x / chosen.sum()
            product = x.new_empty(len(x), 1)
            times_row(x, mean.unsqueeze(1), product)
            rows.append(product[:, 0] * inverse)
    return torch.stack(rows) if rows else tokens.new_zeros(tokens.shape[:2])


# Stage 2: relevance, inside the decoder


def relevance_ratios(
    mass: torch.Tensor, is_visual: torch.Tensor, is_text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Say how much text attends to visual tokens, and visual tokens to text.

    The rows of a softmax sum to 1, so a share of the attention of several rows is the mean of their shares.

    Args:
        mass: What share of its attention each row puts on visual and on text tokens, mean over heads, (B, S, 2). Values
            in rows that are neither, such as padding, are not looked at.
        is_visual: Visual tokens, (B, S), bool.
        is_text: Text tokens after the first visual token, (B, S), bool.

    Returns:
        alpha_tv and alpha_vt, (B,) each, float32, in 0..1. Where there are no rows to look at, 1: nothing speaks for
        dropping anything.
    """
    return _mean_of_rows(mass[..., 0], is_text), _mean_of_rows(mass[..., 1], is_visual)


def _mean_of_rows(share: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    count = rows.sum(1)
    total = torch.where(rows, share.float(), 0.0).sum(1)
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)


# The method


@register("todre")
@dataclass(frozen=True)
class ToDRE(Selector):
    """Keep diverse visual tokens, and drop them all late in the decoder where the text no longer needs them.

    A budget (keep_ratio or num_keep) is needed unless `stages=(2,)`; knobs of a stage that doesn't run have no effect.

    Attributes:
        strategy: How stage 1 measures diversity, see `select_diverse`.
        pivot: Stage 1's first token, see `choose_pivot`.
        relevance: Whether stage 2 runs. False is the same as `stages=(1,)`.
        depth: Where stage 2 looks: the share of the decoder's layers before the drop, in (0, 1), or several of them.
        tau: Stage 2 drops the visual tokens of a sample if both attention ratios are below this, in 0..1.
        stages: Which stages run: (1,), (2,) or (1, 2). Left out, it follows `relevance`.
        seed: For `pivot="random"`.
        correction: "centred" measures similarity without what all tokens of the image have in common, "standardised" by
            features of the vision tower, each channel at mean 0 and variance 1, see
            `vltok.methods.pruning.correction`. The pivot is chosen as without it.
    """

    fixed: ClassVar[tuple[str, ...]] = ("relevance", "depth", "stages")  # they decide which layers are hooked

    strategy: Strategy = "max_sum"
    pivot: Pivot = "auto"
    relevance: bool = True
    depth: float | tuple[float, ...] = 7 / 8
    tau: float = 0.10
    stages: tuple[int, ...] | None = None
    seed: int = 0
    correction: Correction | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.relevance, bool):
            raise TypeError(f"relevance must be True or False, got {self.relevance!r}")
        stages = self._checked_stages()
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "relevance", 2 in stages)
        if stages == (2,) and self.keep_ratio is None and self.num_keep is None:
            object.__setattr__(self, "keep_ratio", 1.0)
        super().__post_init__()
        check_choice("strategy", self.strategy, Strategy)
        check_choice("pivot", self.pivot, Pivot)
        check_choice("correction", self.correction, (None, *get_args(Correction)))
        if isinstance(self.depth, list):
            object.__setattr__(self, "depth", tuple(self.depth))
        depths = self._depths()
        if not depths or not all(is_number(depth) and 0 < depth < 1 for depth in depths):
            raise ValueError(f"depth must be a share of the decoder's layers in (0, 1), or several, got {self.depth!r}")
        if not is_number(self.tau) or not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be a share of attention in 0..1, got {self.tau!r}")
        check_integer("seed", self.seed)

    def _checked_stages(self) -> tuple[int, ...]:
        if self.stages is None:
            return (1, 2) if self.relevance else (1,)
        stages = tuple(self.stages) if isinstance(self.stages, list | tuple) else self.stages
        if stages not in ((1,), (2,), (1, 2)):
            raise ValueError(f"stages must be (1,), (2,) or (1, 2), got {self.stages!r}")
        if 2 in stages and not self.relevance:
            raise ValueError(
                f"relevance=False leaves out stage 2, but stages={stages} names it; give one of them, or stages=(1,)"
            )
        return stages

    def _depths(self) -> tuple[float, ...]:
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)

    def attach(self, view: LanguageView, edits: Edits, run: Run) -> None:
        if 1 in self.stages:
            view.on_visual_tokens(edits, run, self)
        if 2 in self.stages:
            view.on_decoder_layers(edits, run, self)

    def attention_request(self, has_cls: bool) -> AttentionRequest | None:
        wanted = self.pivot == "cls" or (self.pivot == "auto" and has_cls)
        return AttentionRequest("cls", layer=-1) if wanted else None

    @property
    def needs(self) -> tuple[Need, ...]:
        return needed_by(self.correction)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        def pick(visual: VisualTokens, tokens: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            pivot = choose_pivot(
                visual.embeddings,
                self.pivot,
                attention=visual.attention,
                image_keys=visual.image_keys,
                is_overview=visual.is_overview,
                seed=self.seed,
            )
            return select_diverse(tokens, num_keep, pivot, self.strategy, weights)

        return pick_corrected(visual, num_keep, self.correction, pick)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """After how many of L decoder layers the visual tokens may leave: depth * L, rounded down, within 1..L - 1.

        28 of 32 layers at depth 7/8: layers 29 to 32 may run without visual tokens. Ascending, each once; none if L is
        1.
        """
        layers = {layer_at(depth, num_layers) for depth in self._depths()}
        return tuple(sorted(layers)) if num_layers > 1 else ()

    def decide(self, alpha_tv: torch.Tensor, alpha_vt: torch.Tensor) -> torch.Tensor:
        """Whether all visual tokens of each sample are dropped, (B,), bool."""
        return (alpha_tv < self.tau) & (alpha_vt < self.tau)

    def keep(self, state: DecoderState) -> torch.Tensor:
        """All visual tokens of a sample go on, or none, as `relevance_ratios` of its attention say."""
        alpha_tv, alpha_vt = relevance_ratios(state.mass, state.is_visual, state.is_text)
        dropped = self.decide(alpha_tv, alpha_vt)
        state.record(alpha_tv, alpha_vt, dropped)
        return ~(dropped.unsqueeze(1) & state.is_visual)
