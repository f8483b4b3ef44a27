"""A student of a teacher that is still training: it waits, or goes on with the newest; a resume repeats what was."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Kill, Started, assert_same_run, distill, rank_environs, rows, settings

from distill.trajectory.audit.listing import Finding
from distill.trajectory.audit.verdicts import BAD, Audit, Verdict, store_audit
from distill.trajectory.manifest import Manifest, load_manifest
from distill.trajectory.store import open_store

SECONDS = 120.0  # until something that must happen is given up
STAGES = {"schedule__kind": "explicit", "schedule__stages": [[0, 2], [4, 8], [8, 24]], "log__every": 1}


class GrowingTrajectory:
    """A trajectory to which the checkpoints of a finished run are added one by one."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = load_manifest(source), folder
        folder.mkdir()
        self.manifest: Manifest = dataclasses.replace(
            self.source, store=open_store(folder), complete=False, checkpoints={}
        )

    def add(self, step: int) -> None:
        checkpoint = self.source.checkpoints[step]
        shutil.copytree(Path(self.source.url) / checkpoint.location, self.folder / checkpoint.location)
        self.manifest.add(checkpoint)

    def end(self) -> None:
        self.manifest.complete = True
        self.manifest.write()


@pytest.fixture
def growing(teacher_run: Path, tmp_path: Path) -> GrowingTrajectory:
    found = GrowingTrajectory(teacher_run / "trajectory", tmp_path / "trajectory")
    found.add(2)
    return found


def student(shards: Path, run_dir: Path, trajectory: Path, **changes: Any) -> list[str]:
    keys = {"teacher__trajectory": str(trajectory), **STAGES, **changes}
    return ["train", *settings(shards, run_dir, **keys)]


def wait_until(happened: Callable[[], Any], run: Started) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert run.is_alive(), run.wait().output
        if time.monotonic() > end:
            run.kill()
            raise AssertionError(f"it did not come to that within {SECONDS} s:\n{run.output.read_text()}")
        time.sleep(0.05)


def taught_by(run_dir: Path) -> list[int]:
    return [row["teacher_step"] for row in rows(run_dir, "train")]


def test_student_that_waits_is_the_student_of_the_finished_teacher_to_the_bit(
    growing: GrowingTrajectory, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait")
    run = Started(arguments, tmp_path / "output")
    for step in (8, 24):
        wait_until(lambda: f"waiting for teacher step {step}" in run.output.read_text(), run)  # noqa: B023
        growing.add(step)
    run.wait().ok()
    distill(student(shards, tmp_path / "after", teacher_run / "trajectory"), tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "after")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_student_stopped_while_it_waits_goes_on_from_there(
    number: int, growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait")
    run = Started(arguments, tmp_path / "output")
    wait_until(lambda: "waiting for teacher step 8" in run.output.read_text(), run)
    run.signal(number)
    ended = run.wait()
    if number == signal.SIGTERM:
        assert ended.code == 143
        assert "after step 4" in ended.output
        assert (tmp_path / "run" / "checkpoints" / "step_00000004").exists()
    for step in (8, 24):
        growing.add(step)
    distill(arguments, tmp_path).ok()
    assert taught_by(tmp_path / "run") == [2] * 4 + [8] * 4 + [24] * 4


def test_student_stopped_before_its_first_teacher_is_there_leaves_at_once(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    stages = {"schedule__stages": [[0, 8]]}
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait", **stages)
    run = Started(arguments, tmp_path / "output")
    wait_until(lambda: "waiting for teacher step 8" in run.output.read_text(), run)
    run.signal(signal.SIGTERM)
    ended = run.wait()
    assert (ended.code, "after step 0" in ended.output) == (143, True)


@pytest.mark.dist
def test_two_ranks_wait_together_and_go_on_together(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait")
    ranks = [
        Started(arguments, tmp_path / f"output{r}", environ) for r, environ in enumerate(rank_environs(2))
    ]
    wait_until(lambda: "waiting for teacher step 8" in ranks[0].output.read_text(), ranks[0])
    growing.add(8)
    growing.add(24)
    for rank in ranks:
        rank.wait().ok()
    assert taught_by(tmp_path / "run") == [2] * 4 + [8] * 4 + [24] * 4


def test_student_of_the_newest_goes_on_and_a_resume_repeats_what_taught(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    """Saved after step 5, killed in step 10: by then step 8 is there, and yet 4 teaches steps 5 to 8 again."""
    growing.add(4)
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="newest")
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 10)).code == -9
    growing.add(8)
    growing.add(16)
    growing.add(24)
    growing.end()
    distill(arguments, tmp_path).ok()
    assert taught_by(tmp_path / "run") == [2] * 4 + [4] * 8
    record = json.loads((tmp_path / "run" / "schedule.json").read_text())
    assert [checkpoint for _, checkpoint in record["stages"]] == [2, 4, 4]
    assert set(record["weights"]) == {"2", "4"}


def test_newest_is_taken_at_the_start_of_a_stage_not_later(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    """Step 8 comes when the second stage has begun with step 4: the third has it."""
    growing.add(4)
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="newest")
    pause = Kill("distill.engine:Engine.step", 6, number=signal.SIGSTOP)
    run = Started(arguments, tmp_path / "output", kill=pause)
    wait_until(lambda: Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", run)
    growing.add(8)
    run.signal(signal.SIGCONT)
    run.wait().ok()
    assert taught_by(tmp_path / "run") == [2] * 4 + [4] * 4 + [8] * 4


def test_checkpoint_that_an_audit_found_bad_is_passed_over_by_the_newest_and_refused_where_it_is_named(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    for step in (4, 16):
        growing.add(step)
    weights = list(growing.manifest.checkpoints[16].weights)
    verdict = Verdict(BAD, weights, [Finding("jump", "does not fit its neighbours")])
    store_audit(growing.manifest.store, Audit(False, 0, 0.0, {16: verdict}))
    stages = {"schedule__stages": [[0, 2], [4, 24]]}
    arguments = student(shards, tmp_path / "run", growing.folder, teacher__unfinished="newest", **stages)
    distill(arguments, tmp_path).ok()
    assert taught_by(tmp_path / "run") == [2] * 4 + [4] * 8

    keys = {"teacher__unfinished": "wait", "schedule__stages": [[0, 2], [4, 24]]}
    run = Started(student(shards, tmp_path / "waits", growing.folder, **keys), tmp_path / "output")
    wait_until(lambda: "waiting for teacher step 24" in run.output.read_text(), run)
    arrived = list(growing.source.checkpoints[24].weights)
    store_audit(growing.manifest.store, Audit(False, 0, 0.0, {24: Verdict(BAD, arrived, verdict.findings)}))
    growing.add(24)
    ended = run.wait()
    assert ended.code == 2
    assert "teacher step 24 has come and is bad: does not fit its neighbours" in ended.output


def test_teacher_that_ends_without_the_step_that_is_waited_for_is_told(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    run = Started(
        student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait"), tmp_path / "output"
    )
    wait_until(lambda: "waiting for teacher step 8" in run.output.read_text(), run)
    growing.end()
    ended = run.wait()
    assert ended.code == 2
    assert "the teacher's run has ended without step 8, which the schedule names; it left [2]" in ended.output


def test_checkpoint_that_is_replaced_while_it_teaches_is_told(
    growing: GrowingTrajectory, shards: Path, tmp_path: Path
) -> None:
    run = Started(
        student(shards, tmp_path / "run", growing.folder, teacher__unfinished="wait"), tmp_path / "output"
    )
    wait_until(lambda: "waiting for teacher step 8" in run.output.read_text(), run)
    entry = growing.manifest.checkpoints[2]
    growing.manifest.add(dataclasses.replace(entry, files={**entry.files, "config.json": [1, "0" * 64]}))
    ended = run.wait()
    assert ended.code == 2
    assert "step 2 was replaced: start the student anew" in ended.output
