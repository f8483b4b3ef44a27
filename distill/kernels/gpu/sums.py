"""The rows of a call summed to its result, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from distill.kernels.gpu.rows import NUM_SUMS

BLOCK = tl.constexpr(1024)


@triton.jit
def sums_kernel(sums, num_rows, result):
    """sums: [N, NUM_SUMS] -> each of the 0-d tensors of `Divergence`, a program each."""
    column = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        at = sums + row.to(tl.int64) * NUM_SUMS + column
        total += tl.load(at, mask=row < num_rows, other=0.0).to(tl.float64)
    total = tl.sum(total)
    if column == 0:
        tl.store(result.loss, total.to(tl.float32))
    elif column == 1:
        tl.store(result.soft, total.to(tl.float32))
    elif column == 2:
        tl.store(result.soft_ce, total.to(tl.float32))
    elif column == 3:
        tl.store(result.hard, total.to(tl.float32))
    elif column == 4:
        tl.store(result.num_correct, total.to(tl.int64))
    else:
        tl.store(result.num_rows, total.to(tl.int64))
