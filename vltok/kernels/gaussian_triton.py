"""Products with a Gaussian kernel matrix as Triton kernels: the twin of `vltok.kernels.gaussian_mix` on CUDA devices.

Import it only where Triton is installed; `gaussian_mix` does so when it is asked for this backend. One kernel sums
over the columns of the kernel matrix for some of its rows. The product, and each gradient by exchanging the two sets of
tokens, is such a sum. Partial sums are added in a fixed order, so that results don't change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 2**12  # numbers in a block of tokens: products hold their operands in registers, more would overflow
PROGRAMS = 1024  # as many keep a large GPU busy; rows that make fewer have their columns split between programs
SHORTEST = 256  # columns that a program sums at least, lest there be more to add up than to compute


def forward(
    query: torch.Tensor, landmarks: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vltok.kernels.gaussian_mix.forward`, for float32 tensors that are not empty, d and e at most `WIDEST`."""
    m = landmarks.shape[1]
    gathered = torch.cat([product(landmarks, query, values), columns.mT @ values], 1)
    mixed = weight @ gathered
    return product(query, landmarks, mixed[:, :m]).baddbmm_(columns, mixed[:, m:]), gathered


def backward(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    gathered: torch.Tensor,
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """As `vltok.kernels.gaussian_mix.backward`; E is summed as two matrices, (g (W K^T V)^T) * K and (V u^T) * K."""
    m = landmarks.shape[1]
    received = torch.cat([product(landmarks, query, grad), columns.mT @ grad], 1)
    mixed, back = weight @ gathered, weight.mT @ received
    near_mixed, near_back = mixed[:, :m], back[:, :m]
    _, grad_query = _sums(query, landmarks, grad, near_mixed, weighted=False, pulled=True)
    grad_values, more_query = _sums(query, landmarks, values, near_back, weighted=True, pulled=True)
    _, grad_landmarks = _sums(landmarks, query, near_mixed, grad, weighted=False, pulled=True)
    _, more_landmarks = _sums(landmarks, query, near_back, values, weighted=False, pulled=True)
    grad_values.baddbmm_(columns, back[:, m:])
    grad_columns = torch.baddbmm(grad @ mixed[:, m:].mT, values, back[:, m:].mT)
    return [
        grad_query.add_(more_query),
        grad_landmarks.add_(more_landmarks),
        grad_values,
        received @ gathered.mT,
        grad_columns,
    ]


def product(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """K(a, b) values for (B, N, d), (B, M, d), (B, M, e) -> (B, N, e)."""
    out, _ = _sums(a, b, None, values, weighted=True, pulled=False)
    return out


def _sums(
    x: torch.Tensor,
    y: torch.Tensor,
    x_weight: torch.Tensor | None,
    y_weight: torch.Tensor,
    weighted: bool,
    pulled: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sum over the tokens y for each token x.

    Args:
        x: Tokens, (B, N, d).
        y: Tokens, (B, M, d).
        x_weight: A row for each x, (B, N, e); needed for `pulled`.
        y_weight: A row for each y, (B, M, e).
        weighted: Whether to sum K_ij y_weight_j.
        pulled: Whether to sum K_ij (x_weight_i y_weight_j) (y_j - x_i).

    Returns:
        The two sums, (B, N, e) and (B, N, d), None where not asked for.
    """
    (batch, n, d), m, e = x.shape, y.shape[1], y_weight.shape[-1]
    block_d, block_e = _block(d), _block(e)
    side = max(16, TILE // max(64, block_d, block_e))
    num_rows, num_columns = min(side, _block(n)), min(side, _block(m))
    blocks = triton.cdiv(n, num_rows)
    splits = max(1, min(PROGRAMS // (batch * blocks), m // SHORTEST))
    length = triton.cdiv(triton.cdiv(m, splits), num_columns) * num_columns
    splits = triton.cdiv(m, length)
    out = x.new_empty(batch, splits, n, e) if weighted else None
    pull = x.new_empty(batch, splits, n, d) if pulled else None
    x, y, y_weight = x.contiguous(), y.contiguous(), y_weight.contiguous()
    x_weight = x_weight.contiguous() if pulled else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _sum_kernel[(batch * splits * blocks,)](
            *(x, y, x_weight, y_weight, out, pull),
            *(n, m, blocks, splits, length),
            *(d, e, block_d, block_e, num_rows, num_columns, _precision(x)),
            num_warps=4,
            num_stages=1,
        )
    return _added(out), _added(pull)


def _precision(x: torch.Tensor) -> str:
    """How products are computed, to about 1e-6 either way: by tensor cores in three parts, where there are any."""
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return "tf32x3"
    return "ieee"


def _block(size: int) -> int:
    """The power of two that holds so many, and at least the 16 that a product of tiles takes."""
    return max(16, triton.next_power_of_2(size))


def _added(parts: torch.Tensor | None) -> torch.Tensor | None:
    """Sum of the parts that programs left, (B, splits, N, c) -> (B, N, c)."""
    if parts is None:
        return None
    return parts.squeeze(1) if parts.shape[1] == 1 else parts.sum(1)


@triton.jit
def _sum_kernel(
    x_ptr,
    y_ptr,
    x_weight_ptr,
    y_weight_ptr,
    out_ptr,
    pull_ptr,
    n,
    m,
    blocks,
    splits,
    length,
    d: tl.constexpr,
    e: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of rows by one split of the columns of one sample; an output that is None is not computed."""
    program = tl.program_id(0).to(tl.int64)  # so are all offsets: tensors may have more than 2^31 numbers
    block, part = program % blocks, program // blocks  # of a sample and split
    sample, split = part // splits, part % splits
    rows = block * num_rows + tl.arange(0, num_rows)
    channels, features = tl.arange(0, block_d), tl.arange(0, block_e)
    at_x = (sample * n + rows)[:, None] * d + channels[None, :]
    x = tl.load(x_ptr + at_x, mask=(rows < n)[:, None] & (channels < d)[None, :], other=0.0)
    half_x = 0.5 * tl.sum(x * x, 1)
    if out_ptr is not None:
        out = tl.zeros((num_rows, block_e), tl.float32)
    if pull_ptr is not None:
        at_x_weight = (sample * n + rows)[:, None] * e + features[None, :]
        x_weight = tl.load(x_weight_ptr + at_x_weight, mask=(rows < n)[:, None] & (features < e)[None, :], other=0.0)
        pull = tl.zeros((num_rows, block_d), tl.float32)
        total = tl.zeros((num_rows,), tl.float32)

    last = tl.minimum((split + 1) * length, m)
    for start in range(split * length, last, num_columns):
        columns = start + tl.arange(0, num_columns)
        inside = (columns < last)[:, None]
        at_y = (sample * m + columns)[:, None] * d + channels[None, :]
        y = tl.load(y_ptr + at_y, mask=inside & (channels < d)[None, :], other=0.0)
        at_y_weight = (sample * m + columns)[:, None] * e + features[None, :]
        # zeros beyond the last column let it add nothing, whatever the kernel is there
        y_weight = tl.load(y_weight_ptr + at_y_weight, mask=inside & (features < e)[None, :], other=0.0)
        half_y = 0.5 * tl.sum(y * y, 1)
        exponent = tl.dot(x, tl.trans(y), input_precision=precision) - half_x[:, None] - half_y[None, :]
        kernel = tl.exp(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
        if out_ptr is not None:
            out = tl.dot(kernel, y_weight, out, input_precision=precision)
        if pull_ptr is not None:
            pairs = tl.dot(x_weight, tl.trans(y_weight), input_precision=precision) * kernel
            pull = tl.dot(pairs, y, pull, input_precision=precision)
            total += tl.sum(pairs, 1)

    to = (part * n + rows)[:, None]
    if out_ptr is not None:
        tl.store(out_ptr + to * e + features[None, :], out, mask=(rows < n)[:, None] & (features < e)[None, :])
    if pull_ptr is not None:
        pull -= total[:, None] * x
        tl.store(pull_ptr + to * d + channels[None, :], pull, mask=(rows < n)[:, None] & (channels < d)[None, :])


IS_INTERPRETED = not isinstance(_sum_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
