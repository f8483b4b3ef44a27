"""The folder of a run: claimed by one process group at a time, bound to one config, marked when done."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_prep.files import remove_temporary_files
from distill.config import Config, fields_of, to_yaml
from distill.files import write_text
from distill.schedule import Schedule, schedule_from_json

CONFIG, SCHEDULE, RESULT, LOCK = "config.yaml", "schedule.json", "result.json", "run.lock"
WEIGHTS = "weights"  # in schedule.json, beside the schedule
STATE = "state.json"  # written last inside a checkpoint: a folder without it is no checkpoint

# Settings of layout, speed and logging, which may change when a run goes on; all others decide what is learned.
MAY_CHANGE = (
    "run_dir",
    "micro_batch_size",
    "data.shards",
    "data.num_workers",
    "teacher.trajectory",
    "teacher.tokenizer",  # the folder: what is in it is part of the samples' fingerprint
    "teacher.zero_stage",
    "teacher.offload",
    "teacher.cache",
    "teacher.cache_gb",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.activation_checkpointing",
    "engine.compile",
    "objective.chunk_rows",
    "objective.kernel",
    "save.every",
    "save.keep",
    "save.trajectory_to",
    "log.every",
    "log.eval_every",
)


class Weights(Protocol):
    """A checkpoint, by the sha256 of its weight files."""

    @property
    def weights(self) -> tuple[str, ...]: ...


class Scheduled(Protocol):
    """What a schedule's teacher steps are steps of: a trajectory, or targets that one has scored."""

    @property
    def url(self) -> str: ...

    @property
    def checkpoints(self) -> Mapping[int, Weights]: ...


class RunFolderError(ValueError):
    """The folder is in use, or belongs to another run."""


@contextmanager
def claim(config: Config, is_main: bool) -> Iterator[Path]:
    """Hold `config.run_dir` for this run; the main rank locks it.

    Raises:
        RunFolderError: another process holds it, or it was started with other settings (each is named).
    """
    folder = Path(config.run_dir)
    if not is_main:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise RunFolderError(f"run_dir {folder} can't be written: {error}") from error
    with lock:
        _lock(lock, folder)
        for place in (folder, folder / "trajectory"):
            remove_temporary_files(place)
        refuse_other_settings(config)
        yield folder


def store_settings(
    folder: Path, config: Config, schedule: Schedule | None, trajectory: Scheduled | None
) -> None:
    """Bind the folder to what decides the run: its config, its schedule and the weights that teach.

    Call it once all of that is known to fit together; until then any setting may be mended.
    """
    write_text(folder / CONFIG, to_yaml(config))
    if schedule and trajectory:
        store_schedule(folder, schedule, trajectory)


def store_schedule(folder: Path, schedule: Schedule, trajectory: Scheduled) -> None:
    """Bind the run to what teaches when, and to its weights as far as they exist.

    Called at its start, and when a stage is settled: by the student's progress, or by a teacher that is still training.
    """
    content = {**json.loads(schedule.to_json()), WEIGHTS: _weights(schedule, trajectory)}
    write_text(folder / SCHEDULE, json.dumps(content, indent=1))


def read_schedule(folder: Path, trajectory: Scheduled) -> Schedule | None:
    """The schedule this run was started with, or None if it wasn't.

    Raises:
        RunFolderError: `trajectory` lacks a checkpoint of that schedule, or has other weights in it.
    """
    if not ((folder / CONFIG).exists() and (folder / SCHEDULE).exists()):
        return None
    content = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
    stored = content.pop(WEIGHTS, {})
    schedule = schedule_from_json(json.dumps(content))
    now = _weights(schedule, trajectory)
    for step, weights in stored.items():
        if now.get(step) != weights:
            found = "has other weights there" if step in now else "lacks it"
            raise RunFolderError(
                f"{folder} was started with a teacher step {step} of sha256 {weights[0][:12]}, and {trajectory.url} "
                f"{found}: go back to that trajectory or choose another run_dir"
            )
    return schedule


def _weights(schedule: Schedule, trajectory: Scheduled) -> dict[str, list[str]]:
    """sha256 of the weight files of each checkpoint that teaches, by teacher step (text, as JSON keys are)."""
    known = trajectory.checkpoints
    steps = sorted({*(stage.checkpoint for stage in schedule.stages), *schedule.waiting})
    return {str(step): list(known[step].weights) for step in steps if step in known}


def _lock(lock: Any, folder: Path) -> None:
    try:
        # Not flock: readers forked from a killed run would hold that for seconds.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise RunFolderError(
            f"{folder} is in use by {lock.read().strip() or 'another run'}: wait for it or choose another run_dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def refuse_other_settings(config: Config) -> None:
    """Raises RunFolderError if the run in `config.run_dir`, started or finished, has other settings (each is named)."""
    folder = Path(config.run_dir)
    before = stored_settings(folder)
    if before is None:
        return
    now = {key: value for key, _, value in fields_of(config)}
    differences = [
        f"{key}: {before.get(key)!r} -> {now[key]!r}"
        for key in now
        if key not in MAY_CHANGE and before.get(key, now[key]) != now[key]
    ]
    if differences:
        raise RunFolderError(
            f"{folder} was started with other settings; choose another run_dir or go back to\n  "
            + "\n  ".join(differences)
        )


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in `folder` by dotted key, or None if there is none."""
    path = folder / CONFIG
    return _flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else None


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    groups = {
        f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), f.name))
    }
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{key}.") if not prefix and key in groups else {prefix + key: value}
    return flat


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run found, or None while it is not finished."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Mark the run as finished."""
    write_text(folder / RESULT, json.dumps(result, indent=1))


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the run in `folder` keeps its resumable checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step_{step:08d}"


def saved_checkpoints(folder: Path) -> list[Path]:
    """Complete resumable checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (folder / "checkpoints").glob(f"step_????????/{STATE}"))


def step_of(checkpoint: Path) -> int:
    """The step after which a resumable checkpoint was saved, as its name says."""
    return int(checkpoint.name.removeprefix("step_"))
