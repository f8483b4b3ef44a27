"""From the bytes of a sample back to what the teacher said. M entries of N rows; K entries a row, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.sample_order import Ints
from distill.targets.bits import unpack_flags, unpack_rising
from distill.targets.codecs import Codec
from distill.targets.encode import NOTHING, SIZES, STEPS_A_NAT
from distill.targets.sparse import SparseTargets

PROBABILITIES = np.exp(-np.arange(NOTHING + 1) / STEPS_A_NAT).astype(np.float32)  # by code
PROBABILITIES[NOTHING] = 0.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Stored(NamedTuple):
    """Entries as they were stored: row and id of each, its probability; tail and gold, or None."""

    num_rows: int
    rows_M: Ints
    ids_M: Ints
    probs_M: np.ndarray
    tail_N: np.ndarray | None = None
    gold_N: np.ndarray | None = None


def from_bytes(codec: Codec, payload: bytes, vocab_size: int) -> Stored:
    """What `to_bytes` wrote. With a tail, probabilities are divided by their sum, which rounding has moved off 1."""
    num_rows, count = SIZES.unpack_from(payload)
    keys_M, rest = unpack_rising(memoryview(payload)[SIZES.size :], count, num_rows * vocab_size)
    rows_M, ids_M = np.divmod(keys_M, vocab_size)
    if codec.name == "sampled":
        firsts = np.flatnonzero(unpack_flags(rest, num_rows * codec.draws)[0])
        times_M = np.diff(firsts, append=num_rows * codec.draws)
        return Stored(num_rows, rows_M, ids_M, (times_M / codec.draws).astype(np.float32))
    probs = PROBABILITIES[np.frombuffer(rest, "<u2", count + 2 * num_rows)]
    probs_M, tail_N, gold_N = probs[:count], probs[count : count + num_rows], probs[count + num_rows :]
    sum_N = (np.bincount(rows_M, probs_M, num_rows) + tail_N).astype(np.float32)
    return Stored(num_rows, rows_M, ids_M, probs_M / sum_N[rows_M], tail_N / sum_N, gold_N / sum_N)


def hidden_from_bytes(payload: bytes, dtype: str) -> Tensor:
    """hidden_ND as `to_bytes` was given it; the result has memory of its own."""
    num_rows, width = SIZES.unpack_from(payload)
    if num_rows == 0:  # torch makes nothing of no bytes
        return torch.zeros(0, width, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(payload[SIZES.size :]), dtype=DTYPES[dtype]).view(num_rows, width)


def padded(stored: Sequence[Stored]) -> SparseTargets:
    """All rows of all samples, padded to the most entries of a row (at least one) with probability 0."""
    starts = np.cumsum([0] + [s.num_rows for s in stored])
    rows_M = np.concatenate([s.rows_M + start for s, start in zip(stored, starts, strict=False)])
    per_row_N = np.bincount(rows_M, minlength=starts[-1])
    columns_M = np.arange(len(rows_M)) - (np.cumsum(per_row_N) - per_row_N)[rows_M]
    shape = (int(starts[-1]), max(int(per_row_N.max(initial=1)), 1))
    ids_NK, probs_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    ids_NK[rows_M, columns_M] = np.concatenate([s.ids_M for s in stored])
    probs_NK[rows_M, columns_M] = np.concatenate([s.probs_M for s in stored])
    return SparseTargets(
        torch.from_numpy(ids_NK),
        torch.from_numpy(probs_NK),
        _joined([s.tail_N for s in stored]),
        _joined([s.gold_N for s in stored]),
    )


def _joined(parts: Sequence[np.ndarray | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(there)) if there else None
