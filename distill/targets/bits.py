"""Rising sequences of integers in few bits: Elias-Fano (Elias 1974; Fano 1971), packed and unpacked by numpy as a whole.

M values below U cost about 2 + log2(U / M) bits each: half a bit above the least that any code needs.
"""

from __future__ import annotations

import numpy as np

from distill.sample_order import Ints


def pack_rising(values_M: Ints, universe: int) -> bytes:
    """values_M: int64, not falling, in 0..universe-1. `unpack_rising` needs their number and the universe again."""
    low = _low_bits(len(values_M), universe)
    is_one = np.zeros(_num_high_bits(len(values_M), universe, low), bool)
    is_one[(values_M >> low) + np.arange(len(values_M))] = True
    return np.packbits(is_one).tobytes() + _pack_low(values_M, low)


def unpack_rising(packed: memoryview, count: int, universe: int) -> tuple[Ints, memoryview]:
    """(the values, what of `packed` comes after them)."""
    low = _low_bits(count, universe)
    num_bits = _num_high_bits(count, universe, low)
    is_one, packed = unpack_flags(packed, num_bits)
    values_M = (np.flatnonzero(is_one) - np.arange(count)) << low
    for shift in range(0, low - low % 8, 8):
        values_M |= np.frombuffer(packed, np.uint8, count).astype(np.int64) << shift
        packed = packed[count:]
    if rest := low % 8:
        bits, packed = unpack_flags(packed, count * rest)
        in_bytes = np.zeros((count, 8), np.uint8)
        in_bytes[:, 8 - rest :] = bits.reshape(count, rest)
        values_M |= np.packbits(in_bytes, axis=1)[:, 0].astype(np.int64) << (low - rest)
    return values_M, packed


def unpack_flags(packed: memoryview, count: int) -> tuple[np.ndarray, memoryview]:
    """(`count` bits that np.packbits made bytes of, as uint8 0 and 1; what of `packed` comes after them)."""
    size = -(-count // 8)
    return np.unpackbits(np.frombuffer(packed, np.uint8, size), count=count), packed[size:]


def _pack_low(values_M: Ints, low: int) -> bytes:
    """The lowest bits: whole bytes one plane after another, then the rest bit by bit."""
    planes = [(values_M >> shift).astype(np.uint8).tobytes() for shift in range(0, low - low % 8, 8)]
    if rest := low % 8:
        highest_M = (values_M >> (low - rest)).astype(np.uint8)
        planes.append(np.packbits(np.unpackbits(highest_M[:, None], axis=1)[:, 8 - rest :]).tobytes())
    return b"".join(planes)


def _low_bits(count: int, universe: int) -> int:
    return max(0, (universe // count).bit_length() - 1) if count else 0


def _num_high_bits(count: int, universe: int, low: int) -> int:
    """A one for each value, a zero for each step of its high part."""
    return count + (universe >> low) + 1 if count else 0
