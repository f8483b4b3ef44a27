"""From which steps a job of a queue has started a run: one that gets no further must not go round for ever.

Imports no torch: batch scripts call it on every start.
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.files import write_text
from distill.run_folder import saved_checkpoints, step_of

ATTEMPTS = "attempts.jsonl"  # in the run's folder, one line a start
MOST_STARTS = 2  # of one job from one step
MOST_STOPS = 10  # of them that were told to stop, by preemption or a time limit


class Standstill(ValueError):
    """A job has started a run too often from the same step."""


def note_start(folder: Path, job: str) -> int:
    """Record that `job` starts the run in `folder` now. Returns the step it goes on from.

    Raises:
        Standstill: it has started there too often already.
    """
    refuse_standstill(folder, job)
    folder.mkdir(parents=True, exist_ok=True)
    step = saved_step(folder)
    _write(folder, [*_attempts(folder), {"job": job, "step": step}])
    return step


def note_stop(folder: Path) -> None:
    """Record that the last start was told to stop: it did not fail."""
    *before, last = _attempts(folder)
    _write(folder, [*before, {**last, "told": True}])


def refuse_standstill(folder: Path, job: str) -> None:
    """Raises Standstill if `job` has started the run in `folder` from where it stands now and failed twice.

    A start that was told to stop has not failed, but ten of them are enough. Another job, that is another `sbatch`, may
    try twice again.
    """
    step = saved_step(folder)
    starts, told = (
        _attempts(folder).count({"job": job, "step": step, **more}) for more in ({}, {"told": True})
    )
    if starts >= MOST_STARTS or told >= MOST_STOPS:
        raise Standstill(
            f"job {job} has started {folder} {starts + told} times from step {step} and saved nothing since: it stops here. "
            "Its log says why; mend that (or give it more time) and submit it again"
        )


def saved_step(folder: Path) -> int:
    """Step of the newest resumable checkpoint of the run in `folder`, 0 without one."""
    saved = saved_checkpoints(folder)
    return step_of(saved[-1]) if saved else 0


def _write(folder: Path, lines: list[dict[str, object]]) -> None:
    write_text(folder / ATTEMPTS, "".join(json.dumps(line) + "\n" for line in lines))


def _attempts(folder: Path) -> list[dict[str, object]]:
    path = folder / ATTEMPTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
