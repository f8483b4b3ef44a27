"""Bytes of a shard: a tar of equally sized members, each one packed sequence as `{sample:09d}.tokens.npy`.

All members of a split have one size, so headers are filled in bulk (a template, nine digits, a checksum)
instead of one `tarfile` call a sample, and sample `i` of a shard lies at
`i * layout.record_bytes + layout.payload_offset`. The bytes depend on tokens, first sample number and
sequence length only: no clock, no user, no library version.
"""

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import whole_file

TAR_BLOCK = 512
END_OF_TAR = bytes(2 * TAR_BLOCK)
MAX_SAMPLES = 10**9  # nine digits in a member name
_SLICE_BYTES = 4 << 20
_CHECKSUM = slice(148, 156)


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in one tar member: header, npy header, tokens, zeros up to 512 bytes."""

    sequence_length: int
    dtype: str  # "uint16" or "uint32"

    @property
    def numpy_dtype(self) -> np.dtype:
        """Little-endian on every machine, so that shards can travel."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def payload_bytes(self) -> int:
        return self.sequence_length * self.numpy_dtype.itemsize

    @property
    def payload_offset(self) -> int:
        """Bytes from the start of the member to its first token."""
        return TAR_BLOCK + len(self.npy_header())

    @property
    def record_bytes(self) -> int:
        return -(-(self.payload_offset + self.payload_bytes) // TAR_BLOCK) * TAR_BLOCK

    def shard_bytes(self, num_samples: int) -> int:
        return num_samples * self.record_bytes + len(END_OF_TAR)

    def npy_header(self) -> bytes:
        """Version 1.0 header of an array [sequence_length]; own code, since numpy's padding changed."""
        shape = f"({self.sequence_length},)"
        text = f"{{'descr': '{self.numpy_dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode("ascii") + b"\n"

    def tar_header(self) -> bytes:
        """Header of sample 0; other samples differ in nine digits and the checksum."""
        member = tarfile.TarInfo(member_name(0))
        member.size = len(self.npy_header()) + self.payload_bytes
        return member.tobuf(format=tarfile.USTAR_FORMAT)


def member_name(sample: int) -> str:
    return f"{sample:09d}.tokens.npy"


def tar_records(tokens_NL: np.ndarray, first_sample: int, layout: RecordLayout) -> np.ndarray:
    """Tar members of samples first_sample, first_sample + 1, ... as uint8 [N, record_bytes]."""
    num_samples = len(tokens_NL)
    records = np.zeros((num_samples, layout.record_bytes), np.uint8)
    records[:, :TAR_BLOCK] = np.frombuffer(layout.tar_header(), np.uint8)
    _number(records, np.arange(first_sample, first_sample + num_samples))
    start = layout.payload_offset
    records[:, TAR_BLOCK:start] = np.frombuffer(layout.npy_header(), np.uint8)
    tokens = np.ascontiguousarray(tokens_NL, layout.numpy_dtype)
    records[:, start : start + layout.payload_bytes] = tokens.view(np.uint8)
    return records


def _number(records: np.ndarray, samples: np.ndarray) -> None:
    """Write the sample numbers into the names, then the checksums (the sum of a header's bytes, in octal)."""
    digits = samples[:, None] // 10 ** np.arange(8, -1, -1) % 10
    records[:, :9] = digits + ord("0")
    records[:, _CHECKSUM] = ord(" ")  # the field counts as spaces in its own sum
    sums = records[:, :TAR_BLOCK].sum(axis=1, dtype=np.int64)
    octal = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
    records[:, 148:154] = octal + ord("0")
    records[:, 154] = 0


def write_tar(path: Path, tokens_NL: np.ndarray, first_sample: int, layout: RecordLayout) -> tuple[int, str]:
    """Write one shard, whole or not at all; returns its (bytes, sha256).

    tokens_NL: unsigned integers [samples, sequence_length]; a memory map is read in slices.
    """
    if first_sample + len(tokens_NL) > MAX_SAMPLES:
        raise ValueError(f"more than {MAX_SAMPLES} samples in a split; raise --sequence-length")
    digest = hashlib.sha256()
    step = max(1, _SLICE_BYTES // layout.record_bytes)
    with whole_file(path) as out:
        for start in range(0, len(tokens_NL), step):
            records = tar_records(tokens_NL[start : start + step], first_sample + start, layout)
            out.write(records.data)
            digest.update(records.data)
        out.write(END_OF_TAR)
        digest.update(END_OF_TAR)
    return layout.shard_bytes(len(tokens_NL)), digest.hexdigest()
