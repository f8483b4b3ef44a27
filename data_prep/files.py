"""Files that appear whole or not at all, and their hashes; folders that one run at a time writes to."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20
LOCK_NAME = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary name beside `path`; on success fsync and rename, on any failure leave nothing behind.

    Raises OSError naming `path` when the disk is full or the folder is closed to writing.
    The name holds the process id, so a worker orphaned by a kill cannot disturb the run that came after it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}; nothing is half-written, the same command goes on"
        raise OSError(error.errno, reason) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON with a final newline, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete the folder and make it again") from error


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Tells input files apart without reading all of a 20 GB dump: name, bytes, hash of both ends."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(BLOCK_BYTES))
        file.seek(max(size - BLOCK_BYTES, 0))
        digest.update(file.read(BLOCK_BYTES))
    return {"name": path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}


def remove_temporary_files(folder: Path) -> None:
    """Clear what a killed run left half-written in `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other processes from writing to it; one that is still empty at the end goes again.

    ValueError when another run holds it. The lock is the operating system's and goes with the process, also by
    kill -9. A folder closed to writing needs none: a finished one may still be looked at.
    """
    try:
        descriptor = _locked(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not folder.is_dir():
            raise
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def _locked(folder: Path) -> int:
    """Descriptor of the folder's locked lock file."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just taken its empty folder away
            continue
        try:
            # not flock: processes started by a run that was killed would hold that for a while
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(path, descriptor):
                return descriptor
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise ValueError(
                f"another run is writing to {folder}; wait for it, or give another folder to --out"
            ) from None
        os.close(descriptor)  # the run that held it has ended and removed the file meanwhile


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def strangers(folder: Path) -> list[str]:
    """Names in a folder, sorted, but for the lock of the run that asks."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_NAME)
