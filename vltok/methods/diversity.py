"""Greedy picks of tokens that differ from each other: the kernel that ToDRE and DivPrune share.

Cosine similarity is made from inner products of the tokens as they come, scaled by float32 norms afterwards. Products
of two bfloat16 (or float16) values are exact in float32, so matrix units that take such values and add in float32 give
the similarity of exactly these values; tokens normalised beforehand would first have to be rounded again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Literal

import torch

GRAM_ENTRIES = 2**28  # entries of the Gram matrices held at a time: 1 GiB of float32
_PRECISION_LOCK = threading.RLock()


@torch.no_grad()
def greedy_order(
    tokens: torch.Tensor, num_keep: int, start: torch.Tensor | None, score: Literal["sum", "max"]
) -> torch.Tensor:
    """Pick again and again the token that is least similar to those picked before.

    Costs one (symmetric) product X X^T per image, or `num_keep` products of X with a row, whichever is cheaper at this
    size, and a few operations on N numbers per pick. The host waits for the device once, at the end, to report unusable
    embeddings.

    Args:
        tokens: B sets of tokens, (B, N, D), any float dtype. A row of norm zero is similar to none.
        num_keep: Picks per set, in 1..N.
        start: The first pick of each set, (B,); None starts at the token whose nearest neighbour is farthest away.
        score: How similar a token is to those picked: the "sum" of its cosines with them, or the largest, "max".

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index. The picks
        of a smaller `num_keep` are the first of these.

    Raises:
        ValueError: If `num_keep` or `start` is out of range, or an embedding is NaN or infinite or overflows when
            squared.
    """
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be (B, N, D) floats, got {tokens.dtype} of shape {tuple(tokens.shape)}")
    batch, length, _ = tokens.shape
    if not 1 <= num_keep <= length:
        raise ValueError(f"num_keep must be in 1..{length} (the visual tokens), got {num_keep}")
    if start is not None and (start.shape != (batch,) or start.is_floating_point()):
        raise ValueError(f"the first picks must be ({batch},) indices, got {start.dtype} of shape {tuple(start.shape)}")
    if batch == 0:
        return torch.empty(0, num_keep, dtype=torch.int64, device=tokens.device)

    tokens = tokens.detach().contiguous()
    needs_gram = start is None or gram_is_cheaper(tokens, num_keep - 1)
    group = max(1, GRAM_ENTRIES // length**2) if needs_gram else batch
    starts = [None] * math.ceil(batch / group) if start is None else start.to(tokens.device).split(group)
    picks, usable = [], []
    with float32_products(tokens):
        for part, first in zip(tokens.split(group), starts, strict=True):
            similarity = CosineRows(part, needs_gram)
            first = similarity.most_isolated() if first is None else first
            picks.append(_follow(similarity, first.clamp(0, length - 1), num_keep, score))
            usable.append(similarity.squared_norms.isfinite().all() & ((first >= 0) & (first < length)).all())
    if not torch.stack(usable).all():  # the one point where the host waits
        _explain(tokens, start)
    return torch.cat(picks)


def _follow(similarity: CosineRows, first: torch.Tensor, num_keep: int, score: str) -> torch.Tensor:
    order = torch.empty(num_keep, len(first), dtype=torch.int64, device=first.device)
    order[0] = first
    total = torch.full_like(similarity.squared_norms, 0.0 if score == "sum" else -math.inf)
    for last, following in pairwise(order.unbind()):
        row = similarity.row(last)  # +inf at the token itself, which stays +inf in every later sum or maximum
        if score == "sum":
            total.add_(row)
        else:
            torch.maximum(total, row, out=total)
        torch.argmin(total, dim=1, out=following)  # documented to return the first of equal values, on any device
    return order.mT.contiguous()


def _explain(tokens: torch.Tensor, start: torch.Tensor | None) -> None:
    """Raise the error that says what is wrong with the input."""
    length = tokens.shape[1]
    if start is not None and ((start < 0) | (start >= length)).any():
        raise ValueError(f"the first picks must be in 0..{length - 1}, got {start.tolist()}")
    usable = tokens.float().square().sum(-1).isfinite().all(1)
    raise ValueError(
        f"the visual tokens of image {(~usable).nonzero().flatten().tolist()} of the batch hold NaN, infinite or "
        "overflowing values, so no similarity can be computed; check the image's pixels and the vision tower's dtype"
    )


class CosineRows:
    """Rows of the cosine matrix of each of B sets of tokens, float32.

    Every image has products of its own, of a shape that doesn't depend on the batch, so its rows don't either.

    Args:
        tokens: (B, N, D), contiguous.
        from_gram: Take the rows from one product X X^T, or make each by a product of X with one row of it.

    Attributes:
        squared_norms: (B, N), float32.
    """

    def __init__(self, tokens: torch.Tensor, from_gram: bool) -> None:
        batch, length, width = tokens.shape
        floats = {"dtype": torch.float32, "device": tokens.device}
        self._offsets = torch.arange(batch, device=tokens.device) * length
        self._flat = torch.empty_like(self._offsets)
        self._row = torch.empty(batch, length, **floats)
        self._gram = None
        if from_gram:
            self._gram = torch.empty(batch, length, length, **floats)
            with float32_products(tokens, matrix_units=True):
                for x, out in zip(tokens, self._gram, strict=True):
                    _write_gram(_exact(x), out)
            self._source = self._gram.view(-1, length)
            diagonal = self._gram.diagonal(dim1=1, dim2=2)
            self.squared_norms = diagonal.clone()
            diagonal.fill_(math.inf)
        else:
            tokens = _exact(tokens)
            self._source = tokens.view(-1, width)
            self.squared_norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).square()
            self._queries = torch.empty(batch, width, dtype=tokens.dtype, device=tokens.device)
            self._products = list(zip(tokens, self._queries.unsqueeze(2), self._row.unsqueeze(2), strict=True))
            self._infinity = torch.full((batch,), math.inf, **floats)
        # A row of norm below 1e-12 counts as zero, as in torch.nn.functional.normalize.
        self._inverse_norms = torch.where(self.squared_norms >= 1e-24, self.squared_norms.rsqrt(), 1.0)

    def row(self, index: torch.Tensor) -> torch.Tensor:
        """Cosines of token `index` (B,) of each set with its tokens, +inf with itself, (B, N); valid until the next."""
        torch.add(index, self._offsets, out=self._flat)
        if self._gram is not None:
            torch.index_select(self._source, 0, self._flat, out=self._row)
        else:
            torch.index_select(self._source, 0, self._flat, out=self._queries)
            for x, query, out in self._products:
                _times_row(x, query, out)
            self._row.view(-1).index_add_(0, self._flat, self._infinity)
        own = self._inverse_norms.view(-1).index_select(0, self._flat)
        return self._row.mul_(self._inverse_norms).mul_(own.unsqueeze(1))

    def most_isolated(self) -> torch.Tensor:
        """The token of each set whose most similar other token is the least similar, (B,); needs the Gram matrix."""
        nearest = []
        for gram, inverse in zip(self._gram, self._inverse_norms, strict=True):
            scaled = gram * inverse
            scaled.diagonal().fill_(-math.inf)
            nearest.append(scaled.amax(1) * inverse)
        return torch.stack(nearest).argmin(1)


def _write_gram(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write X X^T into `out`, (N, N)."""
    length, width = x.shape
    on_cpu = x.device.type == "cpu"
    if on_cpu and length <= 16:
        # BLAS kernels for a handful of rows add up the edge rows in another order, so that equal tokens would get
        # cosines that differ in the last bit, and a tie would not go to the lowest index.
        out.copy_(x.double() @ x.double().T)
        return
    # The product is symmetric: a CPU is spared the lower blocks, which are copied. A GPU has it done before that pays.
    blocks = max(1, min(4, length // 192)) if on_cpu and width >= 256 else 1
    for low, high in pairwise(length * i // blocks for i in range(blocks + 1)):
        _multiply(x[low:high], x[low:].T, out[low:high, low:])
        out[high:, low:high] = out[low:high, high:].T


def _times_row(x: torch.Tensor, column: torch.Tensor, out: torch.Tensor) -> None:
    """Write X times one of its rows, (D, 1), into `out`, (N, 1)."""
    _multiply(x, column, out)
    if x.device.type == "cpu" and len(x) % 4:
        _multiply(x[-4:], column, out[-4:])  # the rows a BLAS kernel leaves to its slower end; see _write_gram


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, torch.float32, out=out)


def _exact(tokens: torch.Tensor) -> torch.Tensor:
    """Bring tokens to the dtype whose products the device makes exactly, into float32."""
    if takes_half_products(tokens):
        return tokens
    return tokens.float()


def takes_half_products(tokens: torch.Tensor) -> bool:
    """Whether the device multiplies these tokens in their own half precision with a float32 result."""
    if tokens.device.type != "cuda" or torch.version.hip is not None:
        return False
    half = tokens.dtype in (torch.bfloat16, torch.float16)
    return half and torch.cuda.get_device_capability(tokens.device) >= (8, 0)


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products that add up in float32 (AMX or AVX512-BF16)."""
    features = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(features.get(name) for name in ("amx_bf16", "avx512_bf16"))


def gram_is_cheaper(tokens: torch.Tensor, num_rows: int) -> bool:
    """Whether one X X^T costs less than `num_rows` products of X with a row.

    X X^T needs N products with a row, but runs at the speed of arithmetic and not of memory: `speedup` says how much
    faster. A product with a row also has a fixed price, here as the number of multiplications made in the time
    (`fixed`). Both are rough figures for a kind of device; being off by 2 costs little, as both routes cost the same
    where they are close.
    """
    length, width = tokens.shape[1:]
    if tokens.device.type == "cpu":
        if length <= 16 or width % 4:  # products with a row would break ties wrongly; see _write_gram
            return True
        fixed = 1e5
        if tokens.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
            speedup = 96
        else:
            speedup = 24 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 12
    else:
        fixed = 2e7
        speedup = 128 if takes_half_products(tokens) else 32
    return num_rows * (length * width + fixed) * speedup >= length * length * width


@contextmanager
def float32_products(tokens: torch.Tensor, matrix_units: bool = False) -> Iterator[None]:
    """Make matrix products inside exact to float32, whatever autocast and the precision settings say.

    With `matrix_units`, float32 products on a CPU that has bfloat16 units may use them if the tokens are bfloat16,
    which loses nothing. The setting is PyTorch's, for the whole process, and is put back on leaving. Threads that come
    here wait for each other; float32 products that a thread makes elsewhere in the meantime have the same precision.
    """
    kind = tokens.device.type
    units = matrix_units and kind == "cpu" and tokens.dtype == torch.bfloat16 and cpu_multiplies_bfloat16()
    wanted = "bf16" if units else "ieee"
    matmul = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}.get(kind)
    with _PRECISION_LOCK, torch.autocast(kind, enabled=False):
        before = matmul.fp32_precision if matmul is not None else wanted
        change = before != wanted and {before, wanted} != {"none", "ieee"}  # unset means ieee
        if change:
            matmul.fp32_precision = wanted
        try:
            yield
        finally:
            if change:
                matmul.fp32_precision = before
