"""The order of samples: a pure function of (seed, epoch, index), computed where it is needed and never stored.

An epoch permutes blocks of neighbouring samples, then the samples inside windows of many blocks, so that reads
stay local while batches mix. Both permutations are Feistel networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 256  # neighbouring samples that stay together on disk, hence in one read
UInt64s = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
GOLDEN: UInt64s = np.array([0x9E3779B97F4A7C15], np.uint64)  # splitmix64's increment


def mix(x: npt.NDArray[Any]) -> UInt64s:
    """splitmix64's finaliser (Steele et al., OOPSLA 2014), a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_of(*parts: int | Ints) -> UInt64s:
    """64-bit keys of several integers, their order counting; arrays give a key for each of their elements."""
    keys = np.zeros(1, np.uint64)
    for part in parts:
        words = [part % 2**64] if isinstance(part, int) else part  # a seed may be any integer
        keys = mix(keys + np.asarray(words).astype(np.uint64) + GOLDEN)
    return keys


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key of several integers."""
    return np.uint64(keys_of(*parts)[0])


def permute(index: Ints, size: int, key: np.uint64) -> Ints:
    """A pseudo-random permutation of range(size) at `index` (any shape): a Feistel network, cycle walking."""
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    round_keys = mix(np.full(4, key) + np.arange(4, dtype=np.uint64))
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():  # the network permutes [0, 4^half); walk until back inside [0, size)
        left, right = x[outside] >> half, x[outside] & low
        for i in range(4):
            left, right = right, left ^ (mix(right ^ round_keys[i]) & low)
        x[outside] = (left << half) | right
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def sample_ids(positions: Ints, num_samples: int, window: int, seed: int) -> tuple[Ints, Ints]:
    """(epoch, sample id) of each position in the endless stream of samples.

    Every epoch visits every sample once.
    """
    epochs, index = positions // num_samples, positions % num_samples
    ids = np.empty_like(index)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = _shuffle(index[here], num_samples, window, seed, int(epoch))
    return epochs, ids


def _shuffle(index: Ints, num_samples: int, window: int, seed: int, epoch: int) -> Ints:
    if window == 1:
        return index
    start = index - index % window
    sizes = np.minimum(window, num_samples - start)
    for first in np.unique(start):  # a batch touches one or two windows
        here = start == first
        index[here] = first + permute(
            index[here] - first, int(sizes[here][0]), key_of(seed, epoch, 1, int(first))
        )
    num_blocks = num_samples // BLOCK  # the samples after the last whole block stay in the last window
    whole = index < num_blocks * BLOCK
    block = permute(index[whole] // BLOCK, max(num_blocks, 1), key_of(seed, epoch, 2))
    index[whole] = block * BLOCK + index[whole] % BLOCK
    return index
