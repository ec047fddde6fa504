"""Similarity of visual tokens, and greedy picks of those that differ: what ToDRE, DivPrune and others share.

Cosine similarity is made from inner products of the tokens as they come, scaled by float32 norms afterwards. Products
of two bfloat16 (or float16) values are exact in float32, so matrix units that take such values and add in float32 give
the similarity of exactly these values; tokens normalised beforehand would first have to be rounded again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from vltok.kernels.greedy import RowOf, Score, follow, pick_apart, rows_of

GRAM_ENTRIES = 2**28  # entries of the Gram matrices held at a time: 1 GiB of float32
_PRECISION_LOCK = threading.RLock()


def greedy_order(
    tokens: torch.Tensor,
    num_keep: int,
    start: torch.Tensor | None,
    score: Score,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pick again and again the token that is least similar to those picked before.

    Costs one (symmetric) product X X^T per image, or `num_keep` products of X with a row, whichever is cheaper at this
    size, and a few operations on N numbers per pick, or one Triton program for all picks, see
    `vltok.kernels.greedy.pick_apart`. The host waits for the device once, at the end, to report unusable embeddings.

    Args:
        tokens: B sets of tokens, (B, N, D), any float dtype. A row of norm zero is similar to none.
        num_keep: Picks per set, in 1..N.
        start: The first pick of each set, (B,); None starts at the token whose nearest neighbour is farthest away.
        score: How similar a token is to those picked: the "sum" of its cosines with them, or the largest, "max".
        weights: What the distance of each token to those picked is multiplied by, (B, N), at least 0; None for 1. The
            distance is 1 - cosine, of the most similar or summed up.

    Returns:
        Picks in the order they were made, (B, num_keep), int64, each token once; ties go to the lowest index. The picks
        of a smaller `num_keep` are the first of these.

    Raises:
        ValueError: If `num_keep` or `start` is out of range, or an embedding is NaN or infinite or overflows when
            squared.
    """
    _check(tokens, num_keep)
    batch, length, _ = tokens.shape
    if start is not None and (start.shape != (batch,) or start.is_floating_point()):
        raise ValueError(f"the first picks must be ({batch},) indices, got {start.dtype} of shape {tuple(start.shape)}")
    if start is not None:
        start = start.to(tokens.device, torch.int64)
        inside = start.clamp(0, length - 1)

    scales = None if weights is None else weights.float().clamp_min(1e-12)  # +inf times 0 would be no number

    def pick(rows: CosineRows, part: slice) -> torch.Tensor:
        scale = None if scales is None else scales[part]
        first = rows.isolated(scale) if start is None else inside[part]
        if rows.matrix is None:
            return follow(rows.row_of, first, num_keep, score, scale)
        return pick_apart(rows.matrix, first, num_keep, score, scale)

    picks, usable = pick_by_cosine(tokens, num_keep, pick, isolated=start is None)
    if start is not None:
        usable = usable & (inside == start).all()
    if not usable:  # the one point where the host waits
        if start is not None and (inside != start).any():
            raise ValueError(f"the first picks must be in 0..{length - 1}, got {start.tolist()}")
        raise unusable(tokens)
    return picks


def cosine_matrix(tokens: torch.Tensor) -> torch.Tensor:
    """Say how similar all tokens of an image are to each other.

    Args:
        tokens: B sets of tokens, (B, N, D), any float dtype.

    Returns:
        Cosines, (B, N, N), float32 whatever the dtype, without a graph. A row of norm zero is similar to none, not even
        to itself. Equal tokens have equal rows, and a set's don't depend on the other sets. See `check_usable`.
    """
    tokens = tokens.detach().contiguous()
    with float32_products(tokens, matrix_units=True):
        return _cosines(tokens)[0]


class CosineRows(NamedTuple):
    """The cosines among the tokens of each of B sets.

    Attributes:
        row_of: Gives the cosines of one token of each set, (B,), with its set, (B, N), +inf with itself. What it gives
            may be written to, and is lost at the next call.
        norms: Norms of the tokens, (B, N), float32.
        matrix: All of them, (B, N, N), +inf on the diagonal. None where rows are made one by one.
        isolated: Gives the token of each set whose nearest neighbour is farthest away, (B,), where the distances of
            each token count so much, (B, N), or None. None where rows are made one by one.
    """

    row_of: RowOf
    norms: torch.Tensor
    matrix: torch.Tensor | None
    isolated: Callable[[torch.Tensor | None], torch.Tensor] | None


def pick_by_cosine(
    tokens: torch.Tensor,
    num_keep: int,
    follow: Callable[[CosineRows, slice], torch.Tensor],
    isolated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let `follow` pick tokens, one after the other, by their cosines. The host never waits for the device.

    Args:
        tokens: B sets of tokens, (B, N, D), any float dtype. A row of norm zero is similar to none.
        num_keep: Picks per set, in 1..N. The cosines of the last need not be asked for.
        follow: Picks from the cosines of some of the sets, and the slice of the batch that they are; gives (b,
            num_keep), int64. Called once, or for a part of a large batch after the other.
        isolated: Whether it looks at `CosineRows.isolated`.

    Returns:
        The picks, (B, num_keep), and whether the cosines are numbers, (), bool: where not, raise `unusable`.

    Raises:
        ValueError: If `num_keep` is out of range, or the tokens are no sets of tokens.
    """
    _check(tokens, num_keep)
    batch, length, _ = tokens.shape
    if batch == 0:
        device = tokens.device
        return torch.empty(0, num_keep, dtype=torch.int64, device=device), torch.ones((), dtype=torch.bool).to(device)

    tokens = tokens.detach().contiguous()
    from_gram = isolated or gram_is_cheaper(tokens, num_keep - 1)
    group = max(1, GRAM_ENTRIES // length**2) if from_gram else batch
    picks, usable = [], []
    with float32_products(tokens, matrix_units=from_gram):
        for low in range(0, batch, group):
            part = slice(low, min(batch, low + group))
            rows = (_rows_of_gram if from_gram else _rows_one_by_one)(tokens[part])
            picks.append(follow(rows, part))
            usable.append(rows.norms.amax() < math.inf)  # false for NaN, too
    if len(picks) == 1:  # by far the most often, and small images notice two operations
        return picks[0], usable[0]
    return torch.cat(picks), torch.stack(usable).all()


def check_usable(tokens: torch.Tensor) -> None:
    """Check that similarity can be computed of visual tokens, (B, N, D).

    Raises:
        ValueError: If an embedding is NaN or infinite or overflows when squared.
    """
    if not _is_usable(tokens).all():
        raise unusable(tokens)


def unusable(tokens: torch.Tensor) -> ValueError:
    """The error that names the images whose visual tokens are not usable."""
    return ValueError(
        f"the visual tokens of image {(~_is_usable(tokens)).nonzero().flatten().tolist()} of the batch hold NaN, "
        "infinite or overflowing values, so no similarity can be computed; check the image's pixels and the vision "
        "tower's dtype"
    )


def _is_usable(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.float().square().sum(-1).isfinite().all(1)


def _check(tokens: torch.Tensor, num_keep: int) -> None:
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be (B, N, D) floats, got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if not 1 <= num_keep <= tokens.shape[1]:
        raise ValueError(f"num_keep must be in 1..{tokens.shape[1]} (the visual tokens), got {num_keep}")


def _rows_of_gram(tokens: torch.Tensor) -> CosineRows:
    """Cosines from one product X X^T per image."""
    cosine, norms = _cosines(tokens)
    diagonal = cosine.diagonal(dim1=1, dim2=2)
    diagonal.fill_(math.inf)

    def isolated(scale: torch.Tensor | None) -> torch.Tensor:
        diagonal.fill_(-math.inf)
        nearest = cosine.amax(2)
        diagonal.fill_(math.inf)
        return (nearest if scale is None else (nearest - 1) * scale).argmin(1)

    return CosineRows(rows_of(cosine), norms, cosine, isolated)


def _cosines(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all tokens with all, (B, N, N), from one product X X^T per image, and the norms, (B, N).

    Every image has a product of its own, whose shape doesn't depend on the batch, so its rows don't either.
    """
    batch, length, _ = tokens.shape
    cosine = torch.empty(batch, length, length, dtype=torch.float32, device=tokens.device)
    for x, out in zip(tokens, cosine, strict=True):
        write_gram(_exact(x), out)
    norms = cosine.diagonal(dim1=1, dim2=2).sqrt()
    inverse = _inverse(norms)
    cosine.mul_(inverse.unsqueeze(1)).mul_(inverse.unsqueeze(2))
    return cosine, norms


def _rows_one_by_one(tokens: torch.Tensor) -> CosineRows:
    """Cosines from a product of X with a row per pick and image."""
    batch, length, width = tokens.shape
    tokens = _exact(tokens)
    norms = torch.linalg.vector_norm(tokens, dim=2, dtype=torch.float32)
    inverse = _inverse(norms)
    offsets = torch.arange(batch, device=tokens.device) * length
    infinity = torch.full((batch,), math.inf, device=tokens.device)
    queries = tokens.new_empty(batch, width)
    row = torch.empty_like(norms)
    flat_tokens, flat_inverse, flat_row = tokens.view(-1, width), inverse.view(-1), row.view(-1)
    products = list(zip(tokens.unbind(), queries.unsqueeze(2).unbind(), row.unsqueeze(2).unbind(), strict=True))

    def row_of(index: torch.Tensor) -> torch.Tensor:
        index = index + offsets
        torch.index_select(flat_tokens, 0, index, out=queries)
        for x, query, out in products:
            times_row(x, query, out)
        row.mul_(inverse).mul_(flat_inverse.index_select(0, index).unsqueeze(1))
        flat_row.index_add_(0, index, infinity)
        return row

    return CosineRows(row_of, norms, None, None)


def _inverse(norms: torch.Tensor) -> torch.Tensor:
    return norms.clamp_min(1e-12).reciprocal()  # a zero row is similar to none; as in torch.nn.functional.normalize


def write_gram(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write X X^T into `out`, (N, N)."""
    length, width = x.shape
    on_cpu = x.device.type == "cpu"
    if on_cpu and length <= 16:
        # BLAS kernels for a handful of rows add up the edge rows in another order, so that equal tokens would get
        # cosines that differ in the last bit, and a tie would not go to the lowest index.
        out.copy_(x.double() @ x.double().T)
        return
    # The product is symmetric: a CPU is spared the lower blocks, which are copied. A GPU has it done before that pays.
    blocks = min(4, length // 192) if on_cpu and width >= 256 else 1
    if blocks <= 1:
        _multiply(x, x.T, out)
        return
    for low, high in pairwise(length * i // blocks for i in range(blocks + 1)):
        _multiply(x[low:high], x[low:].T, out[low:high, low:])
        out[high:, low:high] = out[low:high, high:].T


def times_row(x: torch.Tensor, column: torch.Tensor, out: torch.Tensor) -> None:
    """Write X times a column, (D, 1), into `out`, (N, 1): the same number for equal rows."""
    if x.device.type == "cpu" and len(x) <= 16:
        out.copy_(x.double() @ column.double())  # see write_gram
        return
    _multiply(x, column, out)
    if x.device.type == "cpu" and len(x) % 4:
        _multiply(x[-4:], column, out[-4:])  # the rows a BLAS kernel leaves to its slower end; see write_gram


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write A B into `out`, float32; autocast leaves products with an `out` alone."""
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
        if length <= 16 or width % 4:  # products with a row would break ties wrongly; see write_gram
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
    """Make float32 matrix products inside exact, whatever precision PyTorch is set to.

    With `matrix_units`, float32 products on a CPU that has bfloat16 units may use them if the tokens are bfloat16,
    which loses nothing. The setting is PyTorch's, for the whole process, and is put back on leaving. Threads that come
    here wait for each other; float32 products that a thread makes elsewhere in the meantime have the same precision.
    """
    kind = tokens.device.type
    units = matrix_units and kind == "cpu" and tokens.dtype == torch.bfloat16 and cpu_multiplies_bfloat16()
    wanted = "bf16" if units else "ieee"
    matmul = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}.get(kind)
    with _PRECISION_LOCK:
        before = matmul.fp32_precision if matmul is not None else wanted
        change = before != wanted and {before, wanted} != {"none", "ieee"}  # unset means ieee
        if change:
            matmul.fp32_precision = wanted
        try:
            yield
        finally:
            if change:
                matmul.fp32_precision = before
