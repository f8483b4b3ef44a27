"""From what a teacher says of N rows to the bytes that are stored of each sample.

Suffixes: N rows, K kept entries (ragged rows are padded), V vocabulary, D width, S draws.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.head import Head
from distill.sample_order import GOLDEN, keys_of, mix
from distill.targets.bits import pack_rising
from distill.targets.codecs import Codec

DRAWS_TAG = 4  # tells the draws' random numbers from those of the sample order (1, 2) and the masks (3)
STEPS_A_NAT = 2048  # resolution of a stored log-probability
NOTHING = 65535  # code of a probability of 0, or below exp(-32)
SIZES = struct.Struct(
    "<II"
)  # a payload begins with its numbers of rows and of entries (hidden states: width)
NUMBERS_AT_ONCE = 2**25  # of a chunk of logits


class Kept(NamedTuple):
    """What is kept of N rows, on the CPU, entries by rising id.

    is_entry_NK: bool; of draws, the first of each class. codes_NK, tail_N, gold_N: integers up to NOTHING; None for draws.
    """

    ids_NK: np.ndarray
    is_entry_NK: np.ndarray
    codes_NK: np.ndarray | None = None
    tail_N: np.ndarray | None = None
    gold_N: np.ndarray | None = None


def keep(
    codec: Codec,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    vocab_size: int,
    uniform_NS: np.ndarray | None = None,
) -> Kept | Tensor:
    """What `codec` keeps: hidden states as they are, or a part of the distribution that the head makes of them.

    vocab_size: classes from here on are padding. uniform_NS: float64 in [0, 1), for a codec that draws.
    Raises ValueError if a row is not finite.
    """
    if codec.is_exact:
        if not bool(hidden_ND.isfinite().all()):
            raise ValueError("the teacher's hidden states are not finite")
        return hidden_ND.cpu()
    weight_VD, bias_V, softcap = head
    dtype = (
        torch.float32 if hidden_ND.device.type == "cpu" else hidden_ND.dtype
    )  # its 16-bit products are slow
    bias_V = None if bias_V is None else bias_V[:vocab_size].to(dtype)
    head = Head(weight_VD[:vocab_size].to(dtype), bias_V, softcap)
    at_once = max(1, NUMBERS_AT_ONCE // vocab_size)
    parts = []
    for start in range(0, max(len(hidden_ND), 1), at_once):
        rows = slice(start, start + at_once)
        uniform = None if uniform_NS is None else uniform_NS[rows]
        parts.append(_keep(codec, head(hidden_ND[rows].to(dtype)), labels_N[rows], uniform))
    columns = zip(*parts, strict=True)
    return Kept(*(None if each[0] is None else np.concatenate(each) for each in columns))  # type: ignore[arg-type]


def split(kept: Kept | Tensor, counts_B: Sequence[int]) -> list[Kept | Tensor]:
    """The same by sample: the first `counts_B[0]` rows, then the next."""
    if isinstance(kept, Tensor):
        return list(kept.split(list(counts_B)))
    ends = np.cumsum(counts_B)[:-1]
    columns = [[None] * len(counts_B) if each is None else np.split(each, ends) for each in kept]
    return [Kept(*parts) for parts in zip(*columns, strict=True)]


def _keep(codec: Codec, logits_NV: Tensor, labels_N: Tensor, uniform_NS: np.ndarray | None) -> Kept:
    log_q_NV = torch.log_softmax(logits_NV.float() / codec.temperature, dim=-1)
    if not bool(log_q_NV.amax(1).isfinite().all()):
        raise ValueError("the teacher's logits are not finite")
    if uniform_NS is not None:
        return _draw(log_q_NV, torch.from_numpy(uniform_NS).to(log_q_NV.device))
    return _cut(codec, log_q_NV, labels_N)


def _cut(codec: Codec, log_q_NV: Tensor, labels_N: Tensor) -> Kept:
    log_q_NK, ids_NK = log_q_NV.topk(codec.k, dim=1)
    is_entry_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    if codec.name == "top_p":  # up to the class with which the mass reaches p
        q_NK = log_q_NK.double().exp()
        is_entry_NK = q_NK.cumsum(1) - q_NK < codec.p
    left_NK = log_q_NK.exp().masked_fill(is_entry_NK, 0.0)
    tail_N = log_q_NV.exp().scatter(1, ids_NK, left_NK).sum(1, dtype=torch.float64)
    gold_N = log_q_NV.gather(1, labels_N[:, None]).squeeze(1)
    order_NK = ids_NK.masked_fill(~is_entry_NK, log_q_NV.shape[1]).argsort(1)
    ids_NK, is_entry_NK, log_q_NK = (each.gather(1, order_NK) for each in (ids_NK, is_entry_NK, log_q_NK))
    parts = (ids_NK, is_entry_NK, _codes(log_q_NK), _codes(tail_N.log()), _codes(gold_N))
    return Kept(*(part.cpu().numpy() for part in parts))


def _codes(log_probs: Tensor) -> Tensor:
    """Whole steps of a nat below 0; int32, as torch computes little in uint16."""
    return (-log_probs.double() * STEPS_A_NAT).round().clamp(0, NOTHING).to(torch.int32)


def _draw(log_q_NV: Tensor, uniform_NS: Tensor) -> Kept:
    """By the inverse of the distribution function, in float64: classes of probability 0 are never drawn."""
    cumulative_NV = log_q_NV.double().exp().cumsum(1)
    cumulative_NV /= cumulative_NV[:, -1:].clone()
    ids_NS = torch.searchsorted(cumulative_NV, uniform_NS, right=True).sort(1).values
    is_first_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    is_first_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    return Kept(ids_NS.cpu().numpy(), is_first_NS.cpu().numpy())


def uniforms(seed: int, epoch: int, sample: int, num_rows: int, draws: int) -> np.ndarray:
    """float64 [num_rows, draws] in [0, 1), a function of (seed, epoch, sample, row, draw) alone."""
    key = keys_of(seed, DRAWS_TAG, epoch, sample)
    words = mix(key + np.arange(num_rows * draws, dtype=np.uint64) * GOLDEN)
    return (words >> np.uint64(11)).reshape(num_rows, draws) * 2.0**-53


def to_bytes(kept: Kept | Tensor, vocab_size: int) -> bytes:
    """The payload of one sample."""
    if isinstance(kept, Tensor):
        return SIZES.pack(*kept.shape) + kept.contiguous().view(torch.uint8).numpy().tobytes()
    num_rows = len(kept.ids_NK)
    rows_M, columns_M = np.nonzero(kept.is_entry_NK)
    keys_M = rows_M * vocab_size + kept.ids_NK[rows_M, columns_M]
    parts = [SIZES.pack(num_rows, len(keys_M)), pack_rising(keys_M, num_rows * vocab_size)]
    if kept.codes_NK is None:
        parts.append(np.packbits(kept.is_entry_NK).tobytes())
    else:
        for codes in (kept.codes_NK[rows_M, columns_M], kept.tail_N, kept.gold_N):
            parts.append(np.asarray(codes, "<u2").tobytes())
    return b"".join(parts)
