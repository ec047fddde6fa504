"""Greedy picks as a Triton kernel: the twin of `vltok.kernels.greedy` on CUDA devices.

Import it only where Triton is installed; `pick_apart` does so on CUDA devices. One program picks from one set: scores
stay in its registers, and a pick is the row to read next. It adds and compares the same float32 numbers in the same
order as the loop, so that the picks are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PER_WARP = 2**10  # scores that a warp holds, 32 for each thread, but at least 4 warps share the work


def pick_apart(
    alike: torch.Tensor, first: torch.Tensor, num_keep: int, score: str, scale: torch.Tensor | None
) -> torch.Tensor:
    """As `vltok.kernels.greedy.pick_apart`, for at most `vltok.kernels.greedy.LONGEST` items a set."""
    batch, length, _ = alike.shape
    picks = torch.empty(batch, num_keep, dtype=torch.int64, device=alike.device)
    block = triton.next_power_of_2(length)
    with torch.cuda.device_of(alike):  # Triton launches on the current device
        _pick_kernel[(batch,)](
            *(alike, first.long().contiguous(), None if scale is None else scale.contiguous(), picks),
            *(length, num_keep, score == "sum", block),
            num_warps=max(4, block // PER_WARP),
        )
    return picks


@triton.jit
def _pick_kernel(
    alike_ptr,
    first_ptr,
    scale_ptr,
    picks_ptr,
    length,
    num_keep,
    summed: tl.constexpr,
    block: tl.constexpr,
):
    """All picks of one set; without `scale_ptr` all items count the same."""
    sample = tl.program_id(0).to(tl.int64)  # so are all offsets: the matrices may have more than 2^31 numbers
    items = tl.arange(0, block)
    inside = items < length
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample * length + items, mask=inside, other=1.0)
    pick = tl.load(first_ptr + sample)
    tl.store(picks_ptr + sample * num_keep, pick)
    total = tl.full((block,), 0.0 if summed else float("-inf"), tl.float32)
    for step in range(1, num_keep):
        # beyond the last item all is infinitely alike, as are those picked before
        row = tl.load(alike_ptr + (sample * length + pick) * length + items, mask=inside, other=float("inf"))
        total = total + row if summed else tl.maximum(total, row, propagate_nan=tl.PropagateNan.ALL)
        nearness = total
        if scale_ptr is not None:
            nearness = (total - (step if summed else 1)) * scale
        # torch takes NaN as the smallest; left alone, a pick might lie outside
        nearness = tl.where(nearness == nearness, nearness, float("-inf"))
        pick = tl.argmin(nearness, 0, tie_break_left=True).to(tl.int64)
        tl.store(picks_ptr + sample * num_keep + step, pick)
