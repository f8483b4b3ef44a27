"""A run's checkpoints on their way to a store, while training goes on; each one's entry in the manifest comes last."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.progress import progress
from distill.files import write_text
from distill.trajectory.manifest import NAME, BadTrajectory, Checkpoint, Manifest, load_manifest
from distill.trajectory.store import Store, StoreError, open_store

log = logging.getLogger(__name__)
RETRY_SECONDS = 60.0  # until an upload that failed is tried again
JOURNAL = ".uploaded"  # [etag in the store, sha256] of each file that has arrived
OBJECT_STORAGE = ("s3://", "gs://", "az://")


class Published:
    """The manifest in the store that a trajectory is sent to, as it was last read or written here.

    It is written only over that, so what somebody else writes meanwhile stays, and stops whoever notices.
    """

    def __init__(self, own: Manifest, store: Store) -> None:
        """New, or as an earlier start left it.

        Raises BadTrajectory where another run's trajectory is there; StoreError where it can't be read.
        """
        self._etag = _etag(store, NAME)
        self._tried: Manifest | None = None  # to write; whether it is there, a lost answer leaves open
        if self._etag is None:
            self.manifest = dataclasses.replace(own, store=store, complete=False, checkpoints={})
            return
        self.manifest = load_manifest(store)
        for step, checkpoint in self.manifest.checkpoints.items():
            if step not in own.checkpoints or own.checkpoints[step].files != checkpoint.files:
                raise BadTrajectory(
                    f"{store.url} holds the trajectory of another run (its step {step} is not of this one): "
                    "choose another place"
                )

    @property
    def url(self) -> str:
        return self.manifest.url

    def add(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint whose files are in place. Raises StoreError."""
        checkpoints = {**self.manifest.checkpoints, checkpoint.step: checkpoint}
        self._write(dataclasses.replace(self.manifest, checkpoints=dict(sorted(checkpoints.items()))))

    def mark_complete(self) -> None:
        """Record that the run has ended. Raises StoreError."""
        if not self.manifest.complete:
            self._write(dataclasses.replace(self.manifest, complete=True))

    def check(self) -> None:
        """Raises StoreError where somebody else has written since."""
        store, etag = self.manifest.store, _etag(self.manifest.store, NAME)
        if etag == self._etag:
            return
        if etag is None or self._tried is None or store.read(NAME) != self._tried.to_json().encode():
            raise self._changed()
        self.manifest, self._etag = self._tried, etag

    def _write(self, manifest: Manifest) -> None:
        self._tried, data = manifest, manifest.to_json().encode()
        if self._etag is None:
            manifest.store.create(NAME, data)
        else:
            manifest.store.replace(NAME, data, self._etag)
        self.check()
        if self.manifest is not manifest:
            raise self._changed()

    def _changed(self) -> StoreError:
        said = (
            "was changed by somebody else since it was read here: let one run or command at a time send there, or "
            "choose another place, and start this one again"
        )
        return StoreError(f"{self.url}/{NAME}", said, "changed")


class Publisher:
    """The trajectory that a run leaves in `own.store`, a local folder, and sends on to `store` if there is one.

    What has arrived there is removed from the folder; its entry in the run's own manifest then points to the store.
    A run that goes on sends what has not arrived. Nothing published is ever replaced.
    """

    def __init__(self, own: Manifest, store: Store | None) -> None:
        """Raises BadTrajectory where `store` holds another run's trajectory; StoreError where it can't be read."""
        self.own, self.folder = own, Path(own.url)
        self.published = Published(own, store) if store else None
        self._lock = threading.Lock()  # of the run's own manifest
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        if self.published:
            for step in self.published.manifest.checkpoints:
                location = own.checkpoints[step].location
                if "://" in location:  # it had arrived when the run was killed
                    shutil.rmtree(self._place(location.rpartition("/")[2]), ignore_errors=True)
            self._thread.start()
            self._wake.set()

    def add(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint whose files lie in the folder; its way to the store begins."""
        with self._lock:
            self.own.add(checkpoint)
        self._wake.set()

    def complete(self) -> None:
        """Mark the trajectory as complete when all of it has arrived. Raises StoreError if it can't be sent."""
        self.close()
        if self._thread.ident is not None:
            self._thread.join()
        self._send_pending()
        if self.published:
            self.published.mark_complete()
        if not self.own.complete:
            self.own.complete = True
            self.own.write()

    def close(self) -> None:
        """Begin no other upload. What is cut off is sent when the run goes on."""
        self._closing.set()
        self._wake.set()

    def pending(self) -> list[Checkpoint]:
        """Checkpoints that have not arrived, oldest first."""
        if self.published is None:
            return []
        with self._lock:
            return [c for c in self.own.checkpoints.values() if "://" not in c.location]

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(RETRY_SECONDS if self.pending() else None)
            self._wake.clear()
            try:
                self._send_pending(self._closing.is_set)
            except (OSError, BadTrajectory) as error:
                log.warning("a checkpoint waits in %s: %s", self.folder, error)

    def _send_pending(self, stopped: Callable[[], bool] = lambda: False) -> None:
        while (waiting := self.pending()) and not stopped():
            self._send(waiting[0])

    def _send(self, checkpoint: Checkpoint) -> None:
        assert self.published is not None
        source, start = self._place(checkpoint.location), time.perf_counter()
        upload(self.published, checkpoint, source, source / JOURNAL)
        there = f"{self.published.url}/{checkpoint.location}"
        with self._lock:
            self.own.add(dataclasses.replace(checkpoint, location=there))
        shutil.rmtree(source)
        seconds = time.perf_counter() - start
        log.info(
            "step %d: %.3f GB sent in %.1f s to %s",
            checkpoint.step,
            checkpoint.num_bytes / 1e9,
            seconds,
            there,
        )

    def _place(self, name: str) -> Path:
        """A checkpoint's folder, which is removed once sent. Raises BadTrajectory for what lies anywhere else."""
        place = self.folder / name
        if place.resolve().parent != self.folder.resolve():
            raise BadTrajectory(f"{name!r} is no folder right in {self.folder}: it is not sent, nor removed")
        return place


def upload(there: Published, checkpoint: Checkpoint, source: Path, journal: Path | None = None) -> None:
    """Send the files of a checkpoint from the folder `source`, then add its entry.

    journal: a file that remembers what has arrived, so that a second call goes on there.
    Raises StoreError, also where somebody else writes to the same place; OSError.
    """
    there.check()
    if checkpoint.step in there.manifest.checkpoints:
        return
    store = there.manifest.store.under(checkpoint.location)
    arrived = _arrived(journal) if journal else {}
    etags = {}
    for name, (_, sha) in checkpoint.files.items():
        key = f"{checkpoint.location}/{name}"
        if sha is None or key not in arrived or arrived[key] != [_etag(store, name), sha]:
            store.upload(source / name, name)
            arrived[key] = [_etag(store, name), sha]
            if journal:
                write_text(journal, json.dumps(arrived))
        etags[name] = arrived[key][0]
    for name, etag in etags.items():
        if _etag(store, name) != etag:
            said = "was replaced by somebody else after it was sent: let one run at a time send there"
            raise StoreError(f"{store.url}/{name}", said, "changed")
    there.add(checkpoint)


def _arrived(journal: Path) -> dict[str, Any]:
    """What a journal tells; nothing if it can't be read, so that all is sent again."""
    try:
        return dict(json.loads(journal.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        log.warning("%s can't be read (%s): what it lists is sent again", journal, error)
        return {}


def _etag(store: Store, name: str) -> str | None:
    """Of a file in the store; None if it isn't there."""
    try:
        return store.head(name).etag
    except StoreError as error:
        if error.kind != "missing":
            raise
        return None


def object_storage(url: str) -> Store:
    """The store that a run sends its trajectory to; nothing is asked of it yet.

    Raises ValueError for a folder, where the run's own would lie twice, and for what can't be written.
    """
    store = open_store(url)
    if not store.url.startswith(OBJECT_STORAGE):
        raise ValueError(
            f"save.trajectory_to must be a place in object storage, got {url!r}: give s3://bucket/prefix, gs:// or az://; "
            "leave it out and the trajectory stays in run_dir"
        )
    return store


def publish(source: str | Path, to: str) -> Manifest:
    """Send a trajectory that lies in a local folder to the store at the URL `to`. Returns the manifest there.

    The same call goes on where one was cut off, and adds what is new.

    Raises:
        BadTrajectory: no manifest in `source`, checkpoints that don't lie there, or another trajectory at `to`.
        StoreError: what storage could not do; somebody else writes there.
    """
    own = load_manifest(source)
    there = Published(own, open_store(to))
    waiting = [c for c in own.checkpoints.values() if c.step not in there.manifest.checkpoints]
    if elsewhere := [c.step for c in waiting if "://" in c.location]:
        raise BadTrajectory(
            f"{own.url}: the files of steps {elsewhere} lie elsewhere: `distill trajectory pull` them first"
        )
    folder = Path(own.url)
    journal = folder / JOURNAL if os.access(folder, os.W_OK) else None
    with progress(f"publish {there.url}", sum(c.num_bytes for c in waiting)) as advance:
        for checkpoint in waiting:
            upload(there, checkpoint, folder / checkpoint.location, journal)
            advance(checkpoint.num_bytes)
    if own.complete:
        there.mark_complete()
    if journal:
        journal.unlink(missing_ok=True)
    return there.manifest
