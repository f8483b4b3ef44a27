"""Heads and divergence together, in chunks of rows, so that the logits of all rows never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.kernels.terms import Divergence

Head = Callable[[Tensor], Tensor]
DivergenceFn = Callable[..., Divergence]


def chunked_divergence(
    divergence: DivergenceFn,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head] | None,
    labels_N: Tensor,
    chunk_rows: int,
) -> Divergence:
    """Sum of `divergence(student, teacher, labels)` over chunks. A pair is (hidden_ND, head)."""
    hidden_ND, head = student

    def one_chunk(start: int, stop: int) -> Divergence:
        logits = head(hidden_ND[start:stop])
        return divergence(logits, _teacher_logits(teacher, start, stop), labels_N[start:stop])

    num_rows = hidden_ND.shape[0]
    if num_rows <= chunk_rows:
        return one_chunk(0, num_rows)
    total: Divergence | None = None
    for start in range(0, num_rows, chunk_rows):
        part: Any = checkpoint(one_chunk, start, min(start + chunk_rows, num_rows), use_reentrant=False)
        total = part if total is None else Divergence(*(a + b for a, b in zip(total, part, strict=True)))
    assert total is not None  # num_rows > chunk_rows >= 1
    return total


def _teacher_logits(teacher: tuple[Tensor, Head] | None, start: int, stop: int) -> Tensor | None:
    if teacher is None:
        return None
    hidden_ND, head = teacher
    with torch.no_grad():
        return head(hidden_ND[start:stop])
