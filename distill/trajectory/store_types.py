"""What all stores share: an object's description, the one error, the count of bytes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


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


class StoreError(OSError):
    """What storage could not do: where, what happened, what to do.

    kind: address, bucket, missing, denied, changed, short, listing, refused or unreachable (after all attempts).
    """

    def __init__(self, where: str, sentence: str, kind: str) -> None:
        super().__init__(f"{where} {sentence}")
        self.where, self.sentence, self.kind = where, sentence, kind


@dataclass
class Traffic:
    """Bytes received and requests repeated; counted from several threads."""

    bytes_read: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_read += num_bytes
