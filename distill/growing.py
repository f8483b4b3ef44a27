"""Learning from a teacher that is still training: what teaches a stage is decided when it starts, and recorded."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from distill.distributed import World, agree_on_stop, from_main
from distill.run_folder import store_schedule
from distill.schedule import Schedule
from distill.signals import stop_signal
from distill.trajectory.audit.verdicts import bad_steps, read_audit
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, load_manifest
from distill.trajectory.nodes import Channel

log = logging.getLogger(__name__)
WAIT_SECONDS = 2.0  # between looks at the manifest while nothing else can be done
LOOK_SECONDS = 30.0  # the same while the current checkpoint teaches


class Growing:
    """A trajectory to which checkpoints are added, seen alike by all ranks. Its calls are collective."""

    def __init__(self, manifest: Manifest, policy: str, folder: Path, world: World) -> None:
        """policy: `wait` for a stage's own checkpoint, or go on with the `newest`. folder: of the run."""
        self.manifest, self.policy, self.folder, self.world = manifest, policy, folder, world
        self._ranks = Channel(range(world.size), world.rank)
        self._looked = -LOOK_SECONDS
        self._bad: dict[int, str] = {}  # by the newest audit: why not to learn from a step

    def settle(self, schedule: Schedule, consumed: int) -> Schedule:
        """The schedule with the checkpoint that teaches after `consumed` samples decided, for good.

        Waits until that can be; a stop signal makes it return before, the stage undecided. Also looks for the next
        stage's checkpoint, so that it can be fetched ahead.

        Raises:
            BadTrajectory: the teacher's run has ended without that checkpoint, or replaced one; an audit found it bad.
            StoreError: the manifest can't be read.
        """
        stage = schedule.stage_index(consumed)
        if not schedule.is_settled(stage):
            self._look()
            while (choice := self._choice(schedule, stage)) is None:
                if agree_on_stop(stop_signal(), self.world):
                    return schedule
                time.sleep(WAIT_SECONDS)
                self._look()
            schedule = schedule.settle(stage, choice)
            if self.world.is_main:
                store_schedule(self.folder, schedule, self.manifest)
        if any(step not in self.manifest.checkpoints for step in schedule.upcoming(consumed)[:1]):
            self._look(LOOK_SECONDS)
        return schedule

    def _choice(self, schedule: Schedule, stage: int) -> int | None:
        """The teacher step that teaches this stage; None while that can't be said."""
        wanted, there = schedule.stages[stage].checkpoint, self.manifest.checkpoints
        if wanted in self._bad:
            raise BadTrajectory(
                f"{self.manifest.url}: teacher step {wanted} has come and is bad: {self._bad[wanted]}"
            )
        if wanted in there:
            return wanted
        earlier = [step for step in there if 0 < step < wanted and step not in self._bad]
        if self.policy == "newest" and earlier:
            log.info("teacher step %d is not there yet: step %d teaches on", wanted, max(earlier))
            return max(earlier)
        if self.manifest.complete:
            raise BadTrajectory(
                f"{self.manifest.url}: the teacher's run has ended without step {wanted}, which the schedule names; "
                f"it left {list(there)}"
            )
        log.info("waiting for teacher step %d, the newest is %d", wanted, max(there, default=0))
        return None

    def _look(self, pause: float = 0.0) -> None:
        """Read the manifest again on rank 0, unless that was done less than `pause` seconds ago."""
        if not from_main(int(time.monotonic() - self._looked >= pause), self.world):
            return
        self._looked = time.monotonic()
        read = self._ranks.together(lambda: self._read() if self.world.is_main else None)
        checkpoints, complete, self._bad = self._ranks.gather(read)[0]
        for step, checkpoint in self.manifest.checkpoints.items():
            if step in checkpoints and checkpoints[step].files != checkpoint.files:
                raise BadTrajectory(f"{self.manifest.url}: step {step} was replaced: start the student anew")
        self.manifest.checkpoints, self.manifest.complete = checkpoints, complete

    def _read(self) -> tuple[dict[int, Checkpoint], bool, dict[int, str]]:
        """(checkpoints, whether the run has ended, bad steps with the reason) as they are now."""
        read = load_manifest(self.manifest.store)
        return read.checkpoints, read.complete, bad_steps(read, read_audit(read.store))
