"""A checkpoint's files brought to every node's disk and verified; each byte leaves storage once for all nodes."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from distill.signals import Cancelled, stop_signal
from distill.trajectory.cache import Cache, Held
from distill.trajectory.disk import Disk
from distill.trajectory.landing import Landing
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, refuse_without_hashes, verify
from distill.trajectory.nodes import Channel, Nodes
from distill.trajectory.store import Store

log = logging.getLogger(__name__)
ROUND_BYTES = 128 << 20  # that a node reads before it passes them on and they are hashed
ATTEMPTS = 3  # fetches of a file whose hash is wrong
T = TypeVar("T")


class Fetcher:
    """Has the checkpoints of a trajectory at hand on this node, one at a time. Its calls are collective."""

    def __init__(self, manifest: Manifest, nodes: Nodes, cache: Cache, in_place: bool) -> None:
        """in_place: files in a local folder are read where they lie."""
        self.manifest, self.nodes, self.cache, self.in_place = manifest, nodes, cache, in_place
        self.bytes_read = 0  # from storage by this node; its first rank counts
        self.stopping = threading.Event()  # makes a fetch under way raise Cancelled, as a stop signal does
        self._verified: set[str] = set()

    @contextmanager
    def at_hand(self, step: int, upcoming: Sequence[int] = ()) -> Iterator[Path]:
        """A folder with the verified files of teacher step `step`, which stays for the block.

        upcoming: teacher steps that are needed afterwards, in order; the cache keeps them rather than others.

        Raises:
            BadTrajectory: the manifest has no such step, or files that differ from it, also after a second fetch.
            OSError: no room (StoreError: what storage could not do).
            Cancelled: the run leaves.
        """
        if step not in self.manifest.checkpoints:
            raise BadTrajectory(
                f"{self.manifest.url} has no teacher step {step}; it has {list(self.manifest.checkpoints)}"
            )
        refuse_without_hashes(self.manifest, [step])
        store, key = self.manifest.files_of(step), self._key(step)
        if self.in_place and isinstance(store, Disk):
            self._on_leaders(lambda: self._verify_in_place(step, store.folder, key))
            yield store.folder
            return
        held = self._on_leaders(lambda: self._held(step, store, key, [self._key(s) for s in upcoming]))
        try:
            yield self.cache.folder / key
        finally:
            if held:
                held.release()

    def _on_leaders(self, work: Callable[[], T]) -> T | None:
        """Have the first rank of each node do it; all ranks go on, or raise, together."""
        return self.nodes.all.together(lambda: work() if self.nodes.is_leader else None)

    def _key(self, step: int) -> str:
        """Name of a cache entry: a function of what the manifest says the files are."""
        if step not in self.manifest.checkpoints:  # of a teacher's run that has not come so far
            return f"step_{step:08d}-unknown"
        told = json.dumps(self.manifest.checkpoints[step].files, sort_keys=True)
        return f"step_{step:08d}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    # -------------------------------------------------------------------------------------------- on leaders

    def _verify(self, step: int, folder: Path, key: str) -> int:
        """Unless that was done. Bytes that were read for it."""
        if key in self._verified:
            return 0
        verify(self.manifest, self.manifest.checkpoints[step], folder)
        self._verified.add(key)
        return self.manifest.checkpoints[step].num_bytes

    def _verify_in_place(self, step: int, folder: Path, key: str) -> None:
        self.bytes_read += self._verify(step, folder, key)

    def _held(self, step: int, store: Store, key: str, upcoming: Sequence[str]) -> Held:
        """The cache entry, fetched if any node lacks it. All leaders."""
        leaders, cache, checkpoint = self.nodes.leaders, self.cache, self.manifest.checkpoints[step]
        held = leaders.together(lambda: self._intact(step, key))
        sources = [i for i, has in enumerate(leaders.gather(held is not None)) if has]
        if held and len(sources) == len(leaders.ranks):
            return held
        start = time.perf_counter()
        folder = leaders.together(lambda: held or cache.begin(key, checkpoint.num_bytes, upcoming))
        transfer = Transfer(store, checkpoint, leaders, sources, self.stopping)
        try:
            transfer.run(folder.folder)
        except BaseException:
            folder.release() if held else folder.discard()
            raise
        self.bytes_read += transfer.bytes_read
        log.info(
            "teacher step %d: %.3f MB fetched in %.1f s, %.3f MB of it by this node from storage",
            step,
            checkpoint.num_bytes / 1e6,
            time.perf_counter() - start,
            transfer.bytes_read / 1e6,
        )
        return held or self._published(folder, step, key)

    def _published(self, filled: Held, step: int, key: str) -> Held:
        """The entry made of what was fetched, or the one that another process has made meanwhile, verified too."""
        entry = self.cache.publish(filled, key)
        if entry is filled:
            self._verified.add(key)
            return entry
        try:
            self._verify(step, entry.folder, key)
        except BadTrajectory as error:
            entry.release()
            raise BadTrajectory(
                f"{error}; other processes use it: end them, and remove {entry.folder}"
            ) from error
        return entry

    def _intact(self, step: int, key: str) -> Held | None:
        held = self.cache.hold(key)
        if held is None:
            return None
        try:
            self._verify(step, held.folder, key)
        except BadTrajectory as error:
            log.warning("%s: removing it from the cache", error)
            held.release()
            self.cache.remove(key)
            return None
        return held


class Transfer:
    """One checkpoint's files to the disks of the nodes that lack it, in slices.

    sources: indices of the leaders that have the files and pass on slices; empty: all read slices from storage.
    """

    def __init__(
        self,
        store: Store,
        checkpoint: Checkpoint,
        leaders: Channel,
        sources: Sequence[int],
        stopping: threading.Event,
    ) -> None:
        self.store, self.checkpoint, self.leaders, self.stopping = store, checkpoint, leaders, stopping
        self.from_storage = not sources
        self.sources = list(sources) or list(range(len(leaders.ranks)))
        self.has_files = leaders.index in sources
        self.bytes_read = 0  # from storage by this node

    def run(self, folder: Path) -> None:
        """Fill `folder`, or on a source pass on what lies there. All leaders.

        A file whose hash is wrong is fetched again, ATTEMPTS times in all. Raises BadTrajectory, OSError, Cancelled.
        """
        wrong = list(self.checkpoint.files)
        for _ in range(ATTEMPTS):
            wrong = self._attempt(folder, wrong)
            if not wrong:
                return
        raise BadTrajectory(
            f"{self._name(wrong[0])} does not have the sha256 that the manifest says, {self.checkpoint.files[wrong[0]][1]}, "
            f"in {ATTEMPTS} fetches: the file in storage is damaged; upload it again, or use another checkpoint"
        )

    def _attempt(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Those of the files that have come to some node with another sha256. Hashed while more is fetched."""
        with ExitStack() as files:
            pending = {name: self._file(folder / name, files) for name in names}
            own = {name: future.result() for name, future in pending.items()}
        every, wanted = self.leaders.gather(own), {name: self.checkpoint.files[name][1] for name in names}
        wrong = [name for name in names if any(each[name] != wanted[name] for each in every)]
        for name in wrong:
            log.warning("%s has the sha256 %s, not %s", self._name(name), own[name][:12], wanted[name][:12])
        return wrong

    def _file(self, path: Path, files: ExitStack) -> Future[str]:
        """One file, exchanged; its sha256 to come. `files` closes it."""
        size = self.checkpoint.files[path.name][0]
        landing = self.leaders.together(lambda: Landing(path, size, self.has_files))
        files.callback(landing.close)
        etag = self.leaders.gather(self.leaders.together(lambda: self._etag(path.name, size)))[0]
        digest, hasher = hashlib.sha256(), files.enter_context(ThreadPoolExecutor(1, "hash"))
        for first, last in self._exchange(path.name, landing, etag):
            hasher.submit(digest.update, memoryview(landing.bytes)[first:last])
        return hasher.submit(digest.hexdigest)

    def _etag(self, name: str, size: int) -> str | None:
        """Of the file in storage, asked by one leader, so that all slices come from the same."""
        if not self.from_storage or self.leaders.index > 0:
            return None
        found = self.store.head(name)
        if found.size != size:
            raise BadTrajectory(
                f"{self._name(name)} has {found.size} bytes, the manifest says {size}: "
                "upload it again, or index the trajectory again"
            )
        return found.etag

    def _exchange(self, name: str, landing: Landing, etag: str | None) -> Iterator[tuple[int, int]]:
        """Round by round every source has its slice, read from storage if need be, and passes it on to all.

        Yields (first, last) of the bytes that have come, in order.
        """
        size, number = landing.size, len(self.sources)
        for start in range(0, size, ROUND_BYTES * number):
            length = min(ROUND_BYTES * number, size - start)
            cuts = [start + i * length // number for i in range(number + 1)]
            self.leaders.together(lambda: self._read(name, landing, cuts, etag))  # noqa: B023  # called at once
            for source, first, last in zip(self.sources, cuts, cuts[1:], strict=False):
                if first < last:
                    slice_ = torch.frombuffer(
                        landing.bytes, dtype=torch.uint8, count=last - first, offset=first
                    )
                    self.leaders.broadcast(slice_, source)
            yield start, start + length

    def _read(self, name: str, landing: Landing, cuts: Sequence[int], etag: str | None) -> None:
        """Read this node's slice from storage."""
        if self.stopping.is_set() or stop_signal():
            raise Cancelled
        if self.from_storage:
            first, last = cuts[self.leaders.index], cuts[self.leaders.index + 1]
            self.store.read_into(name, landing.part(first, last), first, etag=etag)
            self.bytes_read += last - first

    def _name(self, name: str) -> str:
        return f"teacher step {self.checkpoint.step}: {self.store.url}/{name}"
