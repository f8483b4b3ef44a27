"""A file that is filled by pieces from anywhere, seen as bytes meanwhile."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any


class Landing:
    """A file of `size` bytes, to be closed; `bytes` is a view of what lies there, and stays when it is closed."""

    def __init__(self, path: Path, size: int, reads_only: bool) -> None:
        """reads_only: it is there already, and isn't changed. Else room for it is made: OSError if there is none."""
        self.size = size
        self._file = open(path, "rb" if reads_only else "w+b")
        if not reads_only and size:
            os.posix_fallocate(
                self._file.fileno(), 0, size
            )  # a full disk is an error here, and a crash later
        how = mmap.ACCESS_COPY if reads_only else mmap.ACCESS_WRITE
        self.bytes: Any = mmap.mmap(self._file.fileno(), size, access=how) if size else bytearray()

    def close(self) -> None:
        self._file.close()

    def part(self, first: int, last: int) -> Part:
        return Part(self._file.fileno(), first, last)


class Part:
    """Bytes [first, last) of a file, set by slices like a memoryview.

    They are written, which takes half the time of setting them in a mapping: that faults in every page by itself.
    """

    def __init__(self, descriptor: int, first: int, last: int) -> None:
        self._descriptor, self._first, self._size = descriptor, first, last - first

    def __len__(self) -> int:
        return self._size

    def __setitem__(self, where: slice, data: memoryview) -> None:
        offset = self._first + where.start
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
