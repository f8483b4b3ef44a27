"""Safetensors files by the byte: what the header says, and tensors as views of bytes that lie in memory.

Format (safetensors 0.8, README): 8 bytes little-endian length of the header, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 << 20  # bytes, as in the safetensors library
FIRST_READ = 64 << 10  # holds the whole header of most files
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ReadBytes = Callable[[int, int], bytes]  # (start, stop) -> the bytes of a file from start to stop


class BadTensors(ValueError):
    """Bytes that are no safetensors file, or one that contradicts itself."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` to `stop` are bytes of the whole file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(read: ReadBytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes by name, from one read of its beginning, two for a long header.

    Raises:
        BadTensors: no safetensors header, an unknown dtype, or tensors that are not where `size` bytes end.
    """
    beginning = read(0, min(size, FIRST_READ))
    if len(beginning) < 8:
        raise BadTensors(f"{size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", beginning[:8])
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise BadTensors(f"the header should have {length} bytes, the file has {size}")
    text = beginning[8 : 8 + length]
    if len(text) < length:
        text += read(len(beginning), 8 + length)
    return parse_header(text, 8 + length, size)


def parse_header(text: bytes, data_start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors that the header `text` names; the data begins at byte `data_start`. Raises as `read_header`."""
    try:
        content: dict[str, Any] = json.loads(text)
        content.pop("__metadata__", None)
        tensors = {name: _info(entry, data_start) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadTensors(f"the header can't be read: {error!r}") from error
    for name, tensor in tensors.items():
        if tensor.stop - tensor.start != tensor.numel * tensor.dtype.itemsize:
            found = tensor.stop - tensor.start
            raise BadTensors(
                f"{name} of {tensor.dtype} {list(tensor.shape)} has {found} bytes by its offsets"
            )
    _check_tiling(tensors, data_start, size)
    return tensors


def _info(entry: dict[str, Any], data_start: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise BadTensors(f"dtype {entry['dtype']} is none of {', '.join(DTYPES)}")
    shape = tuple(int(n) for n in entry["shape"])
    return TensorInfo(DTYPES[entry["dtype"]], shape, data_start + int(start), data_start + int(stop))


def _check_tiling(tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The format allows no hole, no overlap and no byte after the last tensor: a truncated file shows here."""
    expected = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != expected:
            raise BadTensors(f"{name} begins at byte {tensor.start}, expected {expected}")
        expected = tensor.stop
    if expected != size:
        raise BadTensors(f"the tensors end at byte {expected}, the file has {size}")


def view_of(buffer: Any, info: TensorInfo, first: int = 0, last: int | None = None) -> Tensor:
    """Elements `first` to `last` of a tensor as a flat view of `buffer`, the bytes of the whole file.

    Shares memory with the buffer, unless the tensor lies unaligned in it.
    """
    width = info.dtype.itemsize
    count = (info.numel if last is None else last) - first
    start = info.start + first * width
    if count == 0:
        return torch.empty(0, dtype=info.dtype)
    if start % width == 0:
        return torch.frombuffer(buffer, dtype=info.dtype, count=count, offset=start)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count * width, offset=start)
    return raw.clone().view(info.dtype)
