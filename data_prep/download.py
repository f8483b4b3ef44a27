"""Download files over HTTP: resumed by Range requests, checked, and in place only when whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from data_prep.progress import Advance, progress

USER_AGENT = "data_prep/1 (corpus preparation; urllib)"
READ_BYTES = 1 << 18
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0


class Interrupted(OSError):
    """The connection broke before the whole file was there."""


BROKEN = (Interrupted, urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


def fetch_text(url: str) -> str:
    """A small text file. Raises ValueError when the server refuses, OSError when it cannot be reached."""
    pieces: list[bytes] = []
    with _opened(url, 0) as response:
        while piece := response.read(READ_BYTES):
            pieces.append(piece)
    return b"".join(pieces).decode("utf-8", "replace")


def download(url: str, path: Path, sha1: str | None = None) -> None:
    """Bring `url` to `path`. What has arrived stays in `path.part`, and the next call goes on from there.

    With `sha1` (hex) the file is checked, also one that is already there. Without it nothing tells whether
    the rest still belongs to the beginning, so an interrupted file starts again.
    Raises ValueError for a wrong checksum or a refusal, OSError when the server cannot be reached.
    """
    if path.is_file():
        _check(path, path, sha1)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    if sha1 is None:
        partial.unlink(missing_ok=True)
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _receive(url, partial)
            break
        except BROKEN as error:
            if attempt == ATTEMPTS:
                raise OSError(f"{url}: {error}; the same command goes on where this one stopped") from error
            time.sleep(pause)
            pause *= 2
    _check(partial, path, sha1)
    os.replace(partial, path)


def _receive(url: str, partial: Path) -> None:
    """Append what is missing to `partial` and bring it to the disk."""
    have = partial.stat().st_size if partial.is_file() else 0
    have = max(have - 1, 0)  # one byte again: a file that is already whole then needs no special answer
    with _opened(url, have) as response, open(partial, "ab") as file:
        have = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        file.truncate(have)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with progress(partial.stem, total, initial=have) as advance:
            have += _copy(response, file, advance)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise Interrupted(f"the connection broke after {have} of {total} bytes")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, advance: Advance) -> int:
    copied = 0
    while data := response.read(READ_BYTES):
        file.write(data)
        copied += len(data)
        advance(len(data))
    return copied


@contextmanager
def _opened(url: str, first: int) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET from byte `first` on."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not an http or https address")
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={first}-"} if first else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            if error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise ValueError(f"{url}: the server answers {error.code} {error.reason}") from error
            raise Interrupted(f"{error.code} {error.reason}") from error


def _check(found: Path, path: Path, sha1: str | None) -> None:
    if sha1 is None:
        return
    with open(found, "rb") as file:
        digest = hashlib.sha1(usedforsecurity=False)
        while block := file.read(READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != sha1:
        found.unlink()
        raise ValueError(
            f"{path.name} is damaged: sha1 {sha1} expected, {digest.hexdigest()} found; it was deleted, "
            "run the same command again"
        )
