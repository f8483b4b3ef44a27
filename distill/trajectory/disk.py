"""A folder as a store: the same calls, written with temporary names, fsync and rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.files import whole_file
from distill.trajectory.storage import Object, Place, StoreError, Traffic

LOCK = ".store.lock"
READ_BYTES = 1 << 20


class Disk:
    """A local or shared folder. See `Store`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url, self.traffic = folder, str(folder), Traffic()

    def __repr__(self) -> str:
        return f"Disk({self.url})"

    @property
    def bytes_read(self) -> int:
        return self.traffic.bytes_read

    def under(self, prefix: str) -> Disk:
        same = Disk(self.folder / prefix)
        same.traffic = self.traffic
        return same

    def objects(self, prefix: str = "") -> list[Object]:
        if not self.folder.is_dir():
            raise StoreError(self.url, "does not exist or is no folder: correct the path", "missing")
        found = []
        for parent, _, names in os.walk(self.folder / prefix, followlinks=True):
            for name in names:
                path = Path(parent, name)
                # What is half-written is not there yet; a link of a hub cache may lead nowhere.
                if not name.endswith(".tmp") and name != LOCK and path.exists():
                    found.append(self.head(path.relative_to(self.folder).as_posix()))
        return sorted(found, key=lambda o: o.path)

    def head(self, path: str) -> Object:
        try:
            return _object(path, os.stat(self.folder / path))
        except OSError as error:
            raise self._fault(path, error) from None

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        stop = self.head(path).size if stop is None else stop
        data = bytearray(max(stop - start, 0))
        self.read_into(path, memoryview(data), start)
        return bytes(data)

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self.read(*each) for each in ranges]

    def read_into(self, path: str, view: Place, start: int = 0, *, etag: str | None = None) -> None:
        try:
            with open(self.folder / path, "rb", buffering=0) as file:
                now = _object(path, os.fstat(file.fileno()))
                if etag and now.etag != etag:
                    raise StoreError(f"{self.url}/{path}", "was replaced since it was listed", "changed")
                done = 0
                while done < len(view):
                    piece = os.pread(file.fileno(), min(READ_BYTES, len(view) - done), start + done)
                    if not piece:
                        said = f"has {now.size} bytes, {start + len(view)} were expected: it is truncated"
                        raise StoreError(f"{self.url}/{path}", said, "short")
                    view[done : done + len(piece)] = memoryview(piece)
                    done += len(piece)
        except StoreError:
            raise
        except OSError as error:
            raise self._fault(path, error) from None
        self.traffic.add(len(view))

    def write(self, path: str, data: bytes) -> None:
        target = self._ready(path)
        with whole_file(target) as file:
            file.write(data)

    def upload(self, local: Path, path: str) -> None:
        target = self._ready(path)
        with open(local, "rb") as source, whole_file(target) as file:
            shutil.copyfileobj(source, file, 8 << 20)

    def create(self, path: str, data: bytes) -> bool:
        return self._write_if(path, data, None)

    def replace(self, path: str, data: bytes, etag: str) -> bool:
        return self._write_if(path, data, etag)

    def _write_if(self, path: str, data: bytes, etag: str | None) -> bool:
        """Write if the file's etag, None for no file, is the given one; one process of a node at a time."""
        target = self._ready(path)
        with open(self.folder / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = _object(path, target.stat()).etag if target.exists() else None
            if now != etag:
                return False
            with whole_file(target) as file:
                file.write(data)
        return True

    def _ready(self, path: str) -> Path:
        target = self.folder / path
        with suppress(FileExistsError):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _fault(self, path: str, error: OSError) -> StoreError:
        where = f"{self.url}/{path}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return StoreError(
                where, "does not exist: index the trajectory again, or fetch the file", "missing"
            )
        if isinstance(error, PermissionError):
            return StoreError(where, "may not be read: change its permissions", "denied")
        return StoreError(where, f"can't be read ({error.strerror})", "refused")


def _object(path: str, stat: os.stat_result) -> Object:
    return Object(path, stat.st_size, f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}")
