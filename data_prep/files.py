"""Files that appear whole or not at all, and their hashes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20


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
