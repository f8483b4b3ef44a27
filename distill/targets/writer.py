"""Writes targets: a tar a shard, whole or not at all, then its line in the journal of the job that made it."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import zstandard

from data_prep.files import whole_file
from data_prep.tar_records import END_OF_TAR, TAR_BLOCK
from distill.targets.header import NAME, BadTargets, Entry, Header, Range, journal_lines, load_header

ZSTD_LEVEL = 3
SUFFIX = "targets.zst"


def member_name(epoch: int, sample: int) -> str:
    """Its part before the first dot is the key under which webdataset gives the sample."""
    return f"{epoch:05d}_{sample:012d}.{SUFFIX}"


def compress(payload: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(payload)


def write_shard(
    folder: Path, place: Range, members: Iterable[tuple[str, bytes]], rows: int, raw: int
) -> Entry:
    """Write the shard of `place`. members: name and compressed payload of each sample, in the training order."""
    digest, size = hashlib.sha256(), 0
    with whole_file(folder / place.name) as file:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for block in (header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % TAR_BLOCK)):
                file.write(block)
                digest.update(block)
                size += len(block)
        file.write(END_OF_TAR)
        digest.update(END_OF_TAR)
    return Entry(place.first, rows, size + len(END_OF_TAR), raw, digest.hexdigest())


def finished(folder: Path) -> dict[int, Entry]:
    """Shards that are there in the size their line says, by first sample. What somebody has deleted is not."""
    return {e.first: e for e in journal_lines(folder) if _size(folder / Range(e.first, 0, 0).name) == e.bytes}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


class Journal:
    """The shards that one part of the work has finished; held by one job at a time.

    Jobs of other parts write other journals into the same folder and need not know of each other.
    """

    def __init__(self, folder: Path, header: Header, part: tuple[int, int]) -> None:
        """Raises BadTargets if the folder holds other targets or another job is at this part, OSError without locks."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._path = folder, folder / f"part-{part[0]}-of-{part[1]}.jsonl"
        strangers = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
        if not (folder / NAME).exists():  # looked for last: what another job writes comes after its header
            if strangers:
                raise BadTargets(
                    f"{folder} is not empty (it holds {strangers[0]!r}): give an empty folder to --out"
                )
            header.save(folder)
        load_header(folder).refuse_other(header)  # also of a job that began in the same moment
        self._file = self._locked()

    def _locked(self) -> io.FileIO:
        file = self._path.open("ab+", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                reason = f"cannot lock {self._path}: {error.strerror}; give --out a folder on a file system with locks"
                raise OSError(error.errno, reason) from error
            raise BadTargets(
                f"{self._path} is in use: another job scores this part; wait for it, or share the work by --part I/N"
            ) from error
        file.seek(0)
        if (content := file.read()) and not content.endswith(b"\n"):  # a line that a kill cut off
            file.truncate(content.rfind(b"\n") + 1)
        return file

    def add(self, entry: Entry) -> None:
        """Note a shard that is on disk."""
        self._file.write((json.dumps(dataclasses.asdict(entry)) + "\n").encode())
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
