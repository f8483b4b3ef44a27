"""Checkpoints on a node's own disk, within a budget of bytes, safe between processes and after a kill.

An entry is a folder with a lock file: who reads it holds the lock shared, who would remove it needs it alone. It is
filled under a temporary name, locked too, and renamed when complete: what a killed process left half-written has no
lock any more and is cleared away. Nothing is fsynced: an entry is verified again by the first use of every run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

LOCK = ".lock"


class Held:
    """A locked folder of the cache: an entry that nobody removes, or one that is being filled."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor

    def share(self) -> None:
        """Let others read it too."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        os.close(self._descriptor)

    def discard(self) -> None:
        """Remove the folder, and release it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()


class Cache:
    """Entries under `folder`, one a key, of at most `budget` bytes together; 0: half of what is free there."""

    def __init__(self, folder: Path, budget: int = 0) -> None:
        self.folder, self._budget = folder, budget

    @property
    def budget(self) -> int:
        if self._budget:
            return self._budget
        return (shutil.disk_usage(self.folder).free + sum(map(_size, self._folders()))) // 2

    def hold(self, key: str) -> Held | None:
        """The entry, kept until released; None if it isn't there."""
        try:
            return self._locked(self.folder / key, fcntl.LOCK_SH)
        except FileNotFoundError:
            return None

    def begin(self, key: str, num_bytes: int, upcoming: Sequence[str]) -> Held:
        """A temporary folder to fill with `num_bytes` for the entry `key`; then comes `publish` or `discard`.

        upcoming: keys in the order in which they will be needed, which decides who makes room.

        Raises:
            OSError: no room, the disk's or the budget's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(num_bytes, upcoming)
        return self._new(self.folder / f".{key}.{socket.gethostname()}.{os.getpid()}.tmp")

    def publish(self, filled: Held, key: str) -> Held:
        """Make the entry of what `begin` gave and was filled. Another process's, if that was faster."""
        try:
            os.rename(filled.folder, self.folder / key)
        except OSError:
            filled.discard()
            if (faster := self.hold(key)) is None:
                raise
            return faster
        filled.folder = self.folder / key
        filled.share()
        return filled

    def remove(self, key: str) -> bool:
        """Take the entry away, unless somebody holds it."""
        entry = self.folder / key
        try:
            held = self._locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        held.folder = entry.with_name(f".{key}.{socket.gethostname()}.{os.getpid()}.old.tmp")
        os.rename(entry, held.folder)
        held.discard()
        return True

    def _make_room(self, num_bytes: int, upcoming: Sequence[str]) -> None:
        """Remove what this run needs last, or never, and of that what was used longest ago."""
        self._clear_half_written()
        sizes = {folder.name: _size(folder) for folder in self._folders()}
        budget = self.budget
        free = budget - sum(sizes.values())
        entries = [name for name in sizes if not name.startswith(".")]
        for key in sorted(entries, key=lambda name: self._worth(name, upcoming)):
            if free >= num_bytes:
                return
            if self.remove(key):
                free += sizes[key]
        if free < num_bytes:
            raise OSError(
                f"{self.folder}: a teacher of {num_bytes / 1e9:,.3f} GB does not fit a budget of {budget / 1e9:,.3f} GB, "
                f"of which {max(free, 0) / 1e9:,.3f} GB are free: raise teacher.cache_gb or give another teacher.cache"
            )

    def _worth(self, key: str, upcoming: Sequence[str]) -> tuple[float, float]:
        """Low for what should go first."""
        if key in upcoming:
            return (1.0, -upcoming.index(key))
        with suppress(FileNotFoundError):
            return (0.0, (self.folder / key / LOCK).stat().st_mtime)
        return (0.0, 0.0)

    def _folders(self) -> Iterable[Path]:
        return [p for p in self.folder.iterdir() if p.is_dir()]

    def _clear_half_written(self) -> None:
        """Remove temporary folders whose process has gone."""
        for folder in self.folder.glob(".*.tmp"):
            try:
                held = self._locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                with suppress(OSError):  # empty, or its process is at work
                    folder.rmdir()
            except OSError:
                continue
            else:
                held.discard()

    def _new(self, folder: Path) -> Held:
        while True:
            with suppress(FileNotFoundError):  # taken for a leftover before it was locked
                folder.mkdir(exist_ok=True)
                (folder / LOCK).touch()
                return self._locked(folder, fcntl.LOCK_EX)

    def _locked(self, folder: Path, kind: int) -> Held:
        """The folder with its lock taken. OSError if another process holds it, FileNotFoundError if it is gone.

        lockf, not flock: data readers forked from a run would hold that as long as they live.
        """
        descriptor = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.lockf(descriptor, kind)
            if not os.path.samestat(os.stat(folder / LOCK), os.fstat(descriptor)):
                raise FileNotFoundError(folder)
            os.utime(descriptor)  # when it was last used
        except OSError:
            os.close(descriptor)
            raise
        return Held(folder, descriptor)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
