"""What all stores share: their calls, an object's description, the one error, the count of bytes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Object:
    """A file in a store; the etag changes with its content, None where the server gives none."""

    path: str
    size: int
    etag: str | None


@dataclass
class Folder:
    """Files that may be a checkpoint: its name, its location as in the manifest, {file: [bytes, sha256 or None]}."""

    name: str
    location: str
    files: dict[str, list[Any]] = field(default_factory=dict)
    etags: dict[str, str | None] = field(default_factory=dict)


GONE = ("missing", "short")  # kinds of StoreError: a file, or its end, is not there


class StoreError(OSError):
    """What storage could not do: where, what happened, what to do.

    kind: address, bucket, missing, denied, changed, short, listing, refused or unreachable (after all attempts).
    """

    def __init__(self, where: str, sentence: str, kind: str) -> None:
        super().__init__(f"{where} {sentence}")
        self.where, self.sentence, self.kind = where, sentence, kind


def may_pass(fault: Exception) -> bool:
    """Whether the same may go well later: storage did not answer, or a shared file system failed."""
    if isinstance(fault, StoreError):
        return fault.kind == "unreachable"
    return isinstance(fault, OSError) and fault.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


@dataclass
class Traffic:
    """Bytes received and requests repeated; counted from several threads."""

    bytes_read: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, num_bytes: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.bytes_read += num_bytes
            self.retries += retries


class Place(Protocol):
    """Where bytes that are read go: a memoryview (uint8, one axis), or what is set by slices like one."""

    def __len__(self) -> int: ...

    def __setitem__(self, where: slice, data: memoryview, /) -> None: ...


class Store(Protocol):
    """A place that holds files under paths such as `step_8/config.json`; `url` names it, free of credentials.

    What can't be done is a StoreError; what a short wait can mend was tried again before.
    """

    url: str
    traffic: Traffic

    @property
    def bytes_read(self) -> int:
        """Bytes received since the store was opened, over all stores made of it by `under`."""

    def under(self, prefix: str) -> Store:
        """The same place, with `prefix` before every path."""

    def objects(self, prefix: str = "") -> list[Object]:
        """All files below `prefix`, sorted by path. A web server can't be listed."""

    def head(self, path: str) -> Object: ...

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, or up to its end."""

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of each (path, start, stop), many requests at once."""

    def read_into(self, path: str, view: Place, start: int = 0, *, etag: str | None = None) -> None:
        """Fill `view` with a file's bytes from `start`, in pieces of 8 MiB, many at once.

        etag: of the file that is meant (`head` tells); a file replaced meanwhile is a StoreError, kind "changed".
        """

    def write(self, path: str, data: bytes) -> None:
        """Make or replace a file, whole or not at all."""

    def upload(self, local: Path, path: str) -> None:
        """Write a file of any size, in parts."""

    def create(self, path: str, data: bytes) -> bool:
        """Write only where nothing is; False when something is."""

    def replace(self, path: str, data: bytes, etag: str) -> bool:
        """Write only over the file with this etag; False when it has another by now."""
