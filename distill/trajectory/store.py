"""Files of a trajectory, in object storage or in a folder, by one interface.

The only file that knows the storage client. Every read is a single ranged request: the client's own `get_ranges`
merges neighbouring ranges into one stream, which costs a factor of ten where a connection is slow.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import HTTPStore, from_url

from distill.trajectory.disk import Disk
from distill.trajectory.storage import Object, Place, Store, StoreError, Traffic
from distill.trajectory.store_errors import meaning, reason_of

PIECE_BYTES = 8 << 20
AT_ONCE = 16  # requests of one read_into
SMALL_AT_ONCE = 32  # requests of one read_many
ATTEMPTS, CHANGED_ATTEMPTS = 20, 3
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
WARNED_AFTER = 3  # attempts
PATIENCE = 120.0  # seconds a request is repeated before it is given up
HUB = "https://huggingface.co"
# Of the environment; Google's endpoint is part of the key.
ENDPOINTS = (
    "AWS_ENDPOINT_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURITE_BLOB_STORAGE_URL",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
REMOTE = ("s3", "gs", "az", "http", "https", "hf")
T = TypeVar("T")
log = logging.getLogger(__name__)


def open_store(url: str | Path, patience: float = PATIENCE) -> Store:
    """The store at a local path, file://, s3://bucket/prefix, gs://, az://, http(s):// or hf://owner/name@revision.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AZURE_STORAGE_..., GOOGLE_..., HF_TOKEN);
    those in a URL are refused. http(s):// and hf:// can be read, not listed or written.

    patience: seconds for which a request that fails is repeated.

    Raises:
        StoreError: a URL of another kind, with credentials in it, or without a bucket.
    """
    parts = urlsplit(str(url))
    if parts.scheme == "file":
        return Disk(Path(parts.path))
    if parts.scheme == "" or "://" not in str(url):
        return Disk(Path(url))
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    if parts.scheme not in REMOTE:
        raise StoreError(
            name, f"is no kind of storage known here: give a folder or one of {REMOTE}", "address"
        )
    if parts.query or parts.username is not None:
        raise StoreError(
            name, "has credentials or a query in its URL: give them in the environment", "address"
        )
    if not parts.netloc:
        raise StoreError(str(url), "names no bucket or server: correct the URL", "address")
    return Remote(name, patience)


class Remote:
    """Object storage or a web server. See `Store`."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self.traffic = url, Traffic()
        self._patience, self._prefix = patience, ""
        self._readonly = urlsplit(url).scheme in ("http", "https", "hf")
        try:
            # Reads are repeated here, by one rule; the parts of an upload by the client, which alone knows them.
            self._client, self._uploader = _client(url, 0), _client(url, 8)
        except (BaseError, ValueError) as error:
            raise StoreError(
                url, f"can't be opened ({reason_of(error)}): correct the URL", "address"
            ) from None

    def __repr__(self) -> str:
        return f"Remote({self.url})"

    @property
    def bytes_read(self) -> int:
        return self.traffic.bytes_read

    def under(self, prefix: str) -> Remote:
        same = object.__new__(Remote)
        same.__dict__ |= self.__dict__
        same.url, same._prefix = f"{self.url}/{prefix}", f"{self._prefix}{prefix}/"
        return same

    def objects(self, prefix: str = "") -> list[Object]:
        if self._readonly:
            raise StoreError(
                self.url, "can't be listed, it is no object storage: it needs a manifest", "listing"
            )
        # The client takes a prefix as whole folders.
        found = _run(
            self._persist(prefix, lambda: obstore.list(self._client, self._key(prefix)).collect_async())
        )
        objects = (Object(o["path"].removeprefix(self._prefix), o["size"], o["e_tag"]) for o in found)
        return sorted(objects, key=lambda o: o.path)

    def head(self, path: str) -> Object:
        found = _run(self._persist(path, lambda: obstore.head_async(self._client, self._key(path))))
        return Object(path, found["size"], found["e_tag"])

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        return bytes(_run(self._piece(path, start, stop, None))[0])

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        async def one(path: str, start: int, stop: int) -> bytes:
            async with slots:
                return bytes((await self._piece(path, start, stop, None))[0])

        async def all_of_them() -> list[bytes]:
            return list(await asyncio.gather(*(one(*r) for r in ranges)))

        slots = asyncio.Semaphore(SMALL_AT_ONCE)
        return _run(all_of_them())

    def read_into(self, path: str, view: Place, start: int = 0, *, etag: str | None = None) -> None:
        seen = {etag} - {None}

        async def one(offset: int) -> None:
            async with slots:
                stop = min(offset + PIECE_BYTES, len(view))
                piece, tag = await self._piece(path, start + offset, start + stop, etag)
                view[offset:stop] = memoryview(piece)
                seen.update({tag} - {None})

        async def all_of_them() -> None:
            await asyncio.gather(*(one(offset) for offset in range(0, len(view), PIECE_BYTES)))

        slots = asyncio.Semaphore(AT_ONCE)
        _run(all_of_them())
        if len(seen) > 1:
            raise self._error(path, "was replaced while it was read: read it again", "changed")

    def write(self, path: str, data: bytes) -> None:
        _run(self._put(path, data))

    def upload(self, local: Path, path: str) -> None:
        local.stat()  # a missing one is not the storage's fault
        _run(self._put(path, local))

    def create(self, path: str, data: bytes) -> bool:
        return _run(self._put_if(path, data, "create"))

    def replace(self, path: str, data: bytes, etag: str) -> bool:
        return _run(self._put_if(path, data, {"e_tag": etag}))

    async def _put(self, path: str, data: bytes | Path) -> None:
        self._refuse_to_write(path)
        await self._persist(
            path,
            lambda: obstore.put_async(self._uploader, self._key(path), data, chunk_size=PIECE_BYTES),
        )

    async def _put_if(self, path: str, data: bytes, mode: Any) -> bool:
        """Write unless the condition fails. One that fails in a later attempt may be the work of an earlier one."""
        self._refuse_to_write(path)
        attempts = 0

        async def put() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                await obstore.put_async(self._client, self._key(path), data, mode=mode)
            except (AlreadyExistsError, PreconditionError):
                return attempts > 1 and bytes((await self._piece(path, 0, None, None))[0]) == data
            return True

        return await self._persist(path, put)

    def _refuse_to_write(self, path: str) -> None:
        if self._readonly:
            said = "can't be written, it is no object storage: give s3://, gs:// or az://"
            raise self._error(path, said, "listing")

    async def _piece(
        self, path: str, start: int, stop: int | None, etag: str | None
    ) -> tuple[Any, str | None]:
        """(bytes [start, stop) or up to the end, etag of the file they come from)."""
        if stop is not None and stop <= start:
            return b"", etag
        options: Any = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        if etag and not etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = etag

        async def get() -> tuple[Any, str | None]:
            answer = await obstore.get_async(self._client, self._key(path), options=options)
            tag, size = answer.meta["e_tag"], answer.meta["size"]
            if etag and tag and tag != etag:
                raise self._error(
                    path, f"was replaced (etag {tag}, expected {etag}): read it again", "changed"
                )
            last = size if stop is None else stop
            if size < last:
                raise self._error(path, f"has {size} bytes, {last} were expected: it is truncated", "short")
            data = await answer.bytes_async()
            self.traffic.add(len(data))
            if len(data) != last - start:
                raise self._error(path, f"sent {len(data)} bytes of {last - start}", "unreachable")
            return data, tag

        return await self._persist(path, get)

    def _key(self, path: str) -> str:
        return self._prefix + path

    def _error(self, path: str, sentence: str, kind: str) -> StoreError:
        return StoreError(f"{self.url}/{path}".rstrip("/"), sentence, kind)

    async def _persist(self, path: str, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request, ever slower, while its fault is one that passes."""
        end = time.monotonic() + self._patience
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await request()
            except (BaseError, OSError, ValueError, NotImplementedError) as error:
                fault = error if isinstance(error, StoreError) else await self._fault(path, error)
            attempts = {"unreachable": ATTEMPTS, "changed": CHANGED_ATTEMPTS}.get(fault.kind, 1)
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)
            if attempt >= attempts or time.monotonic() + pause > end:
                break
            self.traffic.add(retries=1)
            if attempt == WARNED_AFTER:
                log.warning("%s; trying again for up to %.0f s", fault, end - time.monotonic())
            await asyncio.sleep(pause)
        if attempt > 1:
            fault = StoreError(fault.where, f"{fault.sentence} ({attempt} attempts)", fault.kind)
        raise fault from None

    async def _fault(self, path: str, error: Exception) -> StoreError:
        """What the client's error means, in one sentence. Its own text may quote a signed URL, so it is not shown."""
        text, reason = str(error), reason_of(error)
        if isinstance(error, FileNotFoundError) and "HEAD" in text[:500]:  # the answer to a HEAD has no body
            try:
                await obstore.get_async(self._client, self._key(path))
            except (BaseError, OSError) as second:
                text = str(second)
        return self._error(path, *meaning(error, text, reason))


def _client(url: str, retries: int) -> Any:
    patience: dict[str, Any] = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=30),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    options: dict[str, Any] = {"timeout": "120s", "connect_timeout": "5s", "read_timeout": "30s"}
    scheme = urlsplit(url).scheme
    if scheme == "hf":
        url = hub_address(url)
        if token := os.environ.get("HF_TOKEN"):
            options["default_headers"] = {"authorization": f"Bearer {token}"}
    if any("http://" in told for told in (url, *(os.environ.get(name, "") for name in ENDPOINTS))):
        options["allow_http"] = True
    make: Any = HTTPStore.from_url if scheme in ("http", "https", "hf") else from_url
    return make(url, client_options=options, retry_config=patience)


def hub_address(url: str) -> str:
    """Where the files of hf://owner/name@revision lie, at the hub that HF_ENDPOINT names or the public one."""
    name, _, revision = url.removeprefix("hf://").partition("@")
    return f"{hub_endpoint()}/{name}/resolve/{quote(revision or 'main', safe='')}"


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def _run(work: Awaitable[T]) -> T:
    async def main() -> T:
        return await work

    return asyncio.run(main())
