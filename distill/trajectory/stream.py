"""The next teacher, fetched, verified and converted by a thread while the current one teaches."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from transformers import PreTrainedModel

from data_prep.files import read_json
from distill.config import TeacherConfig
from distill.distributed import World
from distill.trajectory.cache import Cache
from distill.trajectory.fetch import Fetcher
from distill.trajectory.manifest import BadTrajectory, Manifest
from distill.trajectory.nodes import Nodes
from distill.trajectory.weights import OwnPart, Staged

# Keys of config.json that say how a model was saved, not what it computes.
SAVED_BY = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")
LEAVE_SECONDS = 5.0  # for a fetch that is given up


def make_fetcher(manifest: Manifest, config: TeacherConfig, world: World) -> Fetcher:
    """The fetcher of a run: a local trajectory is read where it lies, unless `config.cache` is set. Collective."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill"
    folder = Path(os.path.expandvars(config.cache or default)).expanduser()
    cache = Cache(folder, int(config.cache_gb * 1e9))
    return Fetcher(
        manifest, Nodes(world, f"{socket.gethostname()} {folder}"), cache, in_place=not config.cache
    )


class CheckpointStream:
    """Checkpoints of a trajectory for one model, one ahead. Its calls are collective."""

    def __init__(self, fetcher: Fetcher, first: Path, model: PreTrainedModel, own_part: OwnPart) -> None:
        """first: folder with the config.json that the model was built by; own_part: see `Staged`."""
        self.fetcher, self._staged = fetcher, Staged(model, own_part)
        self.swap_seconds = (
            0.0  # that the steps waited for copies into the model, of teachers that were at hand
        )
        self._config = _what_it_computes(first)
        self._pending: tuple[int, Future[None]] | None = None  # what the copy holds, or will
        self._thread: threading.Thread | None = None

    def prefetch(self, step: int, upcoming: Sequence[int] = ()) -> None:
        """Start to read the checkpoint of teacher step `step`, unless that is under way.

        upcoming: the steps needed afterwards, in order.
        """
        if self._pending is None or self._pending[0] != step:
            self._pending = (step, Future[None]())
            # A daemon: a rank that has to leave must not wait for what another one fetches.
            work = (*self._pending, upcoming, self._thread)
            self._thread = threading.Thread(target=self._stage, args=work, name="next-teacher", daemon=True)
            self._thread.start()

    def is_ready(self, step: int, seconds: float) -> bool:
        """Whether `swap_in` would not have to wait any more, or would fail; waits for that, at most so long."""
        self.prefetch(step)
        assert self._pending is not None
        return bool(wait([self._pending[1]], seconds).done)

    @property
    def has_failed(self) -> bool:
        """Whether what was fetched last can't be had; `swap_in` will tell why. On all ranks alike, once it is ready."""
        return self._pending is not None and self._pending[1].exception() is not None

    def swap_in(self, step: int) -> None:
        """Give the model these weights, in place, once they are there.

        Raises:
            BadTrajectory: the step is unknown, its files differ from the manifest, or the model can't hold them.
            OSError: storage or the disk can't give them.
            Cancelled: a stop signal came before they were there.
        """
        self.prefetch(step)
        assert self._pending is not None
        self._pending[1].result()
        start = time.perf_counter()
        self._staged.swap_in()
        self.swap_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Leave, giving up what is under way; its half of a cache entry is removed now, or by the next that fetches."""
        self.fetcher.stopping.set()
        if self._thread:
            self._thread.join(LEAVE_SECONDS)

    def _stage(
        self, step: int, staged: Future[None], upcoming: Sequence[int], before: threading.Thread | None
    ) -> None:
        try:
            if before:
                before.join()
            with self.fetcher.at_hand(step, upcoming) as folder:
                self.fetcher.nodes.all.together(lambda: self._read(step, folder))
        except BaseException as fault:  # for `swap_in` to raise
            staged.set_exception(fault)
        else:
            staged.set_result(None)

    def _read(self, step: int, folder: Path) -> None:
        try:
            config = _what_it_computes(folder)
            if others := [key for key in config if config[key] != self._config.get(key)]:
                raise BadTrajectory(
                    f"{folder}/config.json has another {others[0]} than the checkpoint that taught first: "
                    f"{config[others[0]]}, not {self._config.get(others[0])}"
                )
            self._staged.read(folder)
        except BadTrajectory as error:
            raise BadTrajectory(f"teacher step {step}: {error}") from error


def _what_it_computes(folder: Path) -> dict[str, object]:
    config = read_json(folder / "config.json")
    return {key: value for key, value in config.items() if key not in SAVED_BY}
