"""A gradient times a number that only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROGRAMS = 2048  # fill any GPU; each ends after one load where the number is 1
BLOCK = 4096


@triton.jit
def scale_kernel(matrix, stride, num_rows, width, factor, BLOCK: tl.constexpr):
    """matrix [num_rows, width] *= factor [], multiplied in float32; a 1 moves nothing."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            start = matrix + tl.cast(row, tl.int64) * stride
            for first in range(0, width, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                inside = columns < width
                x = tl.load(start + columns, mask=inside).to(tl.float32)
                tl.store(start + columns, (x * by).to(matrix.dtype.element_ty), mask=inside)


def scale_(matrix: Tensor, factor: Tensor) -> Tensor:
    """`matrix` [N, V] or [V], any strides, times the 0-d `factor` on its device, in place."""
    rows = matrix if matrix.dim() == 2 else matrix[None]
    if rows.stride(1) != 1 or matrix.dtype == torch.float64 or not matrix.numel():
        return matrix.mul_(factor)
    num_rows, width = rows.shape
    scale_kernel[(min(num_rows, MOST_PROGRAMS),)](
        rows, rows.stride(0), num_rows, width, factor, BLOCK, num_warps=8
    )
    return matrix
