"""Which documents repeat an earlier one, exactly or nearly, in bounded memory.

Every part of the corpus leaves a file of keys: per document an exact hash, a MinHash signature (rensa) of its
word 5-grams, and one hash per band of the signature. Documents that share a band are candidates; the
estimated Jaccard similarity of their signatures decides. Keys are compared in ranges of hash values, so that
only some millions of them are in memory at a time, and no table of the whole corpus is ever built.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rensa  # type: ignore[import-untyped]

from data_prep.files import whole_file

BANDS, BAND_ROWS = 20, 6  # finds 99.8% of pairs at similarity 0.8, 92% at 0.7, before the estimate decides
NUM_HASHES = BANDS * BAND_ROWS
SHINGLE_WORDS = 5
SHINGLE_LETTERS = 12  # where words are not set apart by spaces
SEED = 1
PIECE_CHARACTERS = 1 << 18  # of a long document hashed at once
KEYS_IN_MEMORY = 1 << 21
PAIRS_IN_MEMORY = 1 << 15

Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


@dataclass(frozen=True)
class Keys:
    """Keys of the documents of one part, in order: exact [n], signatures [n, NUM_HASHES] (uint32)."""

    exact: Hashes
    signatures: npt.NDArray[np.uint32]


def text_hash(text: str) -> int:
    """64 bits of the text's BLAKE2b; decides exact duplicates and the split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def make_keys(texts: Iterator[str]) -> Keys:
    """Keys of some documents; texts are drawn one at a time, and "" stands for one that is not compared."""
    exact, rows = [], []
    for text in texts:
        exact.append(text_hash(text))
        rows.append(signature(text))
    signatures = np.stack(rows) if rows else np.empty((0, NUM_HASHES), np.uint32)
    return Keys(np.array(exact, np.uint64), signatures)


def signature(text: str) -> npt.NDArray[np.uint32]:
    """MinHash signature [NUM_HASHES] of a text; zeros for ""."""
    if not text:
        return np.zeros(NUM_HASHES, np.uint32)
    shingles = shingle_hashes(text)
    offsets = np.array([0, len(shingles)], np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_HASHES, SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def shingle_hashes(text: str) -> Hashes:
    """A 64-bit hash of each run of SHINGLE_WORDS words (of letters, in scripts without spaces), lower case.

    Polynomial hashes modulo 2**64 by prefix sums: all runs of a piece of text at once.
    """
    pieces = (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))
    return np.concatenate([_piece_hashes(" ".join(piece.lower().split())) for piece in pieces])


def _piece_hashes(text: str) -> Hashes:
    data = np.frombuffer(text.encode(), np.uint8)
    starts, ends = _shingles(data)
    powers, inverses = _powers(len(data))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * inverses[starts]
    for factor in _MIX:
        hashes = (hashes ^ (hashes >> np.uint64(33))) * factor
    return hashes ^ (hashes >> np.uint64(33))


def _shingles(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Starts and ends (in bytes) of the runs; a text shorter than a run is one run."""
    spaces = np.flatnonzero(data == 32)
    starts, ends = np.append(0, spaces + 1), np.append(spaces, len(data))
    length = SHINGLE_WORDS
    if len(data) > 32 * len(starts):
        starts = np.flatnonzero((data & 0xC0) != 0x80)  # first bytes of UTF-8 letters
        ends, length = np.append(starts[1:], len(data)), SHINGLE_LETTERS
    if len(starts) <= length:
        return starts[:1], ends[-1:]
    return starts[: len(starts) - length + 1], ends[length - 1 :]


_power_tables: list[Hashes] = []


def _powers(length: int) -> tuple[Hashes, Hashes]:
    """_BASE ** i and its inverse for i < length; the tables grow to the longest piece seen and are kept."""
    if not _power_tables or len(_power_tables[0]) < length:
        size = 1 << max(length - 1, 1).bit_length()
        _power_tables[:] = [_power_table(base, size) for base in (_BASE, pow(_BASE, -1, 1 << 64))]
    powers, inverses = _power_tables
    return powers[:length], inverses[: length + 1]


def _power_table(base: int, size: int) -> Hashes:
    factors = np.full(size + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def save_keys(folder: Path, part: int, keys: Keys) -> None:
    """Write the keys of a part: its signatures, and its exact and band hashes column by column."""
    columns = np.concatenate([keys.exact[None], _band_hashes(keys.signatures)])
    with whole_file(_signature_path(folder, part)) as file:
        file.write(keys.signatures.tobytes())
    with whole_file(keys_path(folder, part)) as file:
        file.write(columns.tobytes())


def _band_hashes(signatures: npt.NDArray[np.uint32]) -> Hashes:
    """[BANDS, n] hashes of BAND_ROWS signature entries each."""
    bands = signatures.astype(np.uint64).reshape(-1, BANDS, BAND_ROWS)
    mixed = np.zeros(bands.shape[:2], np.uint64)
    for row in range(BAND_ROWS):
        mixed = (mixed + bands[:, :, row]) * np.uint64(_BASE)
        mixed ^= mixed >> np.uint64(32)
    return mixed.T


def keys_path(folder: Path, part: int) -> Path:
    """Where the exact hashes [n] and then the band hashes [BANDS, n] of a part lie (uint64)."""
    return folder / f"{part:05d}.keys"


def _signature_path(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.signatures"


class Repeats:
    """Finds the repeats among documents whose keys are in `folder`, numbered through all parts.

    counts: documents in each part. `alive` [n] (bool) says which are still kept.
    """

    def __init__(self, folder: Path, counts: list[int]) -> None:
        self.folder = folder
        self.counts = counts
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.alive = np.ones(int(self.first[-1]), bool)
        self.num_ranges = 1 << (max(len(self.alive) - 1, 0) // KEYS_IN_MEMORY).bit_length()

    def extremes(self) -> tuple[int, int]:
        """The kept documents whose texts have the smallest and the largest hash; some must be kept."""
        found = []
        for part, count in enumerate(self.counts):
            hashes = np.fromfile(keys_path(self.folder, part), np.uint64, count)
            kept = np.flatnonzero(self.alive[self.first[part] : self.first[part + 1]])
            for place in (hashes[kept].argmin(), hashes[kept].argmax()) if len(kept) else ():
                found.append((int(hashes[kept[place]]), int(self.first[part] + kept[place])))
        return min(found)[1], max(found)[1]

    def drop_exact(self) -> npt.NDArray[np.int64]:
        """Drop and return the documents whose text is that of an earlier one."""
        dropped = [later for _, later in self._pairs(0)]
        return self._drop(dropped)

    def drop_near(self, similarity: float) -> npt.NDArray[np.int64]:
        """Drop and return the documents at least `similarity` (Jaccard, 0 to 1) like an earlier kept one."""
        dropped = []
        for band in range(1, BANDS + 1):
            for first, later in self._pairs(band):
                near = later[self._similarity(first, later) >= similarity]
                dropped.append(self._drop([near]))
        return np.concatenate(dropped) if dropped else np.empty(0, np.int64)

    def _drop(self, documents: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        found = np.concatenate(documents) if documents else np.empty(0, np.int64)
        self.alive[found] = False
        return found

    def _pairs(self, column: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(first document with a key, later document with it), of kept ones, a range of keys at a time."""
        for number in range(self.num_ranges):
            keys, documents = self._range(column, number)
            order = np.argsort(
                keys, kind="stable"
            )  # documents ascend, so the first of a group is the earliest
            keys, documents = keys[order], documents[order]
            is_first = np.ones(len(keys), bool)
            is_first[1:] = keys[1:] != keys[:-1]
            first = documents[is_first][np.cumsum(is_first) - 1]
            yield first[~is_first], documents[~is_first]

    def _range(self, column: int, number: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
        shift = np.uint64(64 - self.num_ranges.bit_length() + 1)
        keys, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for part, count in enumerate(self.counts):
            path = keys_path(self.folder, part)
            found = np.fromfile(path, np.uint64, count, offset=8 * count * column)
            wanted = self.alive[self.first[part] : self.first[part + 1]].copy()
            if self.num_ranges > 1:
                wanted &= (found >> shift) == number
            keys.append(found[wanted])
            documents.append(np.flatnonzero(wanted) + self.first[part])
        return np.concatenate(keys), np.concatenate(documents)

    def _similarity(
        self, first: npt.NDArray[np.int64], later: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        result = np.empty(len(first))
        for start in range(0, len(first), PAIRS_IN_MEMORY):
            chunk = slice(start, start + PAIRS_IN_MEMORY)
            result[chunk] = (self._signatures(first[chunk]) == self._signatures(later[chunk])).mean(axis=1)
        return result

    def _signatures(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        result = np.empty((len(documents), NUM_HASHES), np.uint32)
        parts = np.searchsorted(self.first, documents, side="right") - 1
        for part in np.unique(parts):
            here = parts == part
            shape = (self.counts[part], NUM_HASHES)
            signatures = np.memmap(_signature_path(self.folder, part), np.uint32, "r", shape=shape)
            result[here] = signatures[documents[here] - self.first[part]]
        return result
