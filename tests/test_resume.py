"""Killed anywhere and started again by the same command, a run ends as if nothing had happened: same bits."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    LENGTH,
    SIZES,
    Kill,
    Started,
    assert_same_run,
    distill,
    distill_on_ranks,
    rank_environs,
    rows,
    settings,
    weights,
)

# Saves, rows and stages fall on different steps; the last step is no multiple of any.
STUDENT = {
    "steps": 14,
    "micro_batch_size": 4,
    "model__overrides": {**SIZES["bert"], "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.1},
    "objective__weights": {"forward_kl": 1.0, "hard": [[0, 0.0], [1, 0.5]]},
    "objective__temperature": [[0, 2.0], [1, 1.0]],
    "schedule__kind": "explicit",
    "schedule__stages": [[0, 2], [4, 8], [9, 24]],
}
TEACHER = {"steps": 14, "save__trajectory_every": 4, "save__trajectory_first": 1}

STUDENT_KILLS = {
    "first step": Kill("distill.engine:Engine.step", 1),
    "between checkpoints": Kill("distill.engine:Engine.step", 8),
    "after a validation and a save": Kill("distill.engine:Engine.step", 12),
    "in accumulation": Kill("distill.engine:Engine.backward", 16),
    "reading a sample": Kill("distill.data:Samples.__getitem__", 19),
    "in a forward": Kill("distill.engine:Student.forward", 15),
    "before a teacher swap": Kill("distill.trajectory.weights:Staged.swap_in", 2),
    "after a teacher swap": Kill("distill.trajectory.weights:Staged.swap_in", 3, before=False),
    "after a row of metrics": Kill("distill.metrics:Log.row", 4, before=False),
    "half of a checkpoint's files": Kill("torch:save", 3, before=False),
    "before a checkpoint's mark": Kill("distill.checkpoint:write_text", 2),
    "before a checkpoint is renamed": Kill("distill.checkpoint:publish_folder", 2),
    "before the old checkpoint goes": Kill("distill.checkpoint:publish_folder", 3, before=False),
    "in removing the old checkpoint": Kill("os:rmdir", 1),
    "after the last checkpoint": Kill("distill.checkpoint:save", 3, before=False),
    "half of the export": Kill("distill.checkpoint:publish_folder", 4),
    "between export and result": Kill("distill.train:write_result", 1),
}
TEACHER_KILLS = {
    "half of a trajectory checkpoint": Kill("distill.checkpoint:publish_folder", 3),
    "between trajectory checkpoint and manifest": Kill("distill.checkpoint:describe", 3),
    "between manifest and resumable checkpoint": Kill(
        "distill.trajectory.manifest:Manifest.add", 4, before=False
    ),
    "before the trajectory is complete": Kill("distill.trajectory.manifest:Manifest.write", 6),
}


def student(shards: Path, teacher_run: Path, run_dir: Path, **changes: Any) -> list[str]:
    trajectory = str(teacher_run / "trajectory")
    return ["train", *settings(shards, run_dir, teacher__trajectory=trajectory, **{**STUDENT, **changes})]


def teacher(shards: Path, run_dir: Path, **changes: Any) -> list[str]:
    return ["train", *settings(shards, run_dir, **{**TEACHER, **changes})]


@pytest.fixture(scope="module")
def undisturbed_student(shards: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    distill(student(shards, teacher_run, folder / "run"), folder).ok()
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed_teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own-teacher")
    distill(teacher(shards, folder / "run"), folder).ok()
    return folder / "run"


def trajectory(run_dir: Path) -> dict[str, Any]:
    """Manifest, and every file's bytes."""
    root = run_dir / "trajectory"
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {**files, "manifest.json": json.loads(files["manifest.json"])}


def assert_nothing_half_written(run_dir: Path) -> None:
    assert not [p for p in run_dir.rglob("*") if p.name.endswith(".tmp")]
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    assert [p.name for p in checkpoints][-2:] == ["step_00000010", "step_00000014"]
    assert all((p / "state.json").exists() for p in checkpoints)


def killed(arguments: list[str], folder: Path, kill: Kill) -> None:
    ended = distill(arguments, folder, kill)
    assert ended.code == -kill.number, ended.output
    assert not (folder / "run" / "result.json").exists()


@pytest.mark.parametrize("place", STUDENT_KILLS)
def test_student_killed_goes_on_to_the_same_bits(
    place: str, shards: Path, teacher_run: Path, undisturbed_student: Path, tmp_path: Path
) -> None:
    arguments = student(shards, teacher_run, tmp_path / "run")
    killed(arguments, tmp_path, STUDENT_KILLS[place])
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", undisturbed_student)
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize("place", TEACHER_KILLS)
def test_teacher_killed_leaves_the_same_trajectory_to_the_bit(
    place: str, shards: Path, undisturbed_teacher: Path, tmp_path: Path
) -> None:
    arguments = teacher(shards, tmp_path / "run")
    killed(arguments, tmp_path, TEACHER_KILLS[place])
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", undisturbed_teacher)
    assert trajectory(tmp_path / "run") == trajectory(undisturbed_teacher)
    assert_nothing_half_written(tmp_path / "run")


def test_run_killed_three_times_the_third_while_it_resumes_ends_the_same(
    shards: Path, teacher_run: Path, undisturbed_student: Path, tmp_path: Path
) -> None:
    arguments = student(shards, teacher_run, tmp_path / "run")
    killed(arguments, tmp_path, Kill("distill.engine:Engine.step", 7))
    killed(arguments, tmp_path, Kill("torch:save", 2))
    killed(arguments, tmp_path, Kill("distill.metrics:keep_rows_until", 1, before=False))
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", undisturbed_student)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_is_exact_in_zero_stage_0_2_and_3_too(stage: int, shards: Path, tmp_path: Path) -> None:
    for name in ("calm", "run"):
        arguments = [
            "train",
            *settings(shards, tmp_path / name, micro_batch_size=4, engine__zero_stage=stage),
        ]
        if name == "run":
            killed(arguments, tmp_path, Kill("distill.engine:Engine.step", 8))
        distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


def test_resume_is_exact_in_bf16_with_worker_processes_and_another_layout(
    shards: Path, tmp_path: Path
) -> None:
    changes = {
        "engine__dtype": "bf16",
        "data__task": "clm",
        "data__isolate_documents": True,
        "optim__clip": 0.0,
    }
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    arguments = ["train", *settings(shards, tmp_path / "run", **changes, data__num_workers=2)]
    killed(arguments, tmp_path, Kill("distill.engine:Engine.step", 8))
    distill([*arguments, "data.num_workers=1", "save.every=4"], tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_stop_signal_saves_and_says_so_and_the_run_goes_on_to_the_same_bits(
    number: int, code: int, shards: Path, teacher_run: Path, undisturbed_student: Path, tmp_path: Path
) -> None:
    arguments = student(shards, teacher_run, tmp_path / "run")
    ended = distill(arguments, tmp_path, Kill("distill.engine:Engine.backward", 14, number=number))
    assert ended.code == code
    assert (
        f"stopped by signal {int(number)} after step 7; the same command goes on from there" in ended.output
    )
    assert (tmp_path / "run" / "checkpoints" / "step_00000007" / "state.json").exists()
    assert "Traceback" not in ended.output
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", undisturbed_student)


STOPS = {  # where SIGTERM comes: (the call, the step after which the run leaves)
    "validating": ("distill.engine:Student.forward", 14, 6),  # two of each step came before
    "writing a checkpoint": ("torch:save", 3, 11),
    "making a checkpoint appear": ("distill.checkpoint:publish_folder", 1, 6),
}


@pytest.mark.parametrize("doing", STOPS)
def test_stop_signal_in_the_middle_of_other_work_lets_it_end_and_then_saves(
    doing: str, shards: Path, teacher_run: Path, undisturbed_student: Path, tmp_path: Path
) -> None:
    function, call, step = STOPS[doing]
    arguments = student(shards, teacher_run, tmp_path / "run")
    ended = distill(arguments, tmp_path, Kill(function, call, number=signal.SIGTERM))
    assert ended.code == 143, ended.output
    assert f"stopped by signal 15 after step {step};" in ended.output
    assert not list((tmp_path / "run").rglob("*.tmp"))
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", undisturbed_student)


def test_stop_signal_before_the_first_step_saves_after_it(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run")]
    ended = distill(arguments, tmp_path, Kill("distill.train:build_run", 1, number=signal.SIGTERM))
    assert ended.code == 143
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_stop_signal_in_the_last_step_lets_the_run_end(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run", steps=4)]
    distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 4, number=signal.SIGTERM)).ok()
    assert (tmp_path / "run" / "result.json").exists()


def test_signal_to_the_whole_process_group_stops_workers_too(shards: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal and `scancel` reach the reader processes as well."""
    arguments = ["train", *settings(shards, tmp_path / "run", steps=100000, data__num_workers=2)]
    started = Started(arguments, tmp_path / "output.txt", own_group=True)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000005" / "state.json", started)
    os.killpg(started.pid, signal.SIGINT)
    ended = started.wait()
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output
    assert nobody_left(started.pid)


def nobody_left(group: int, seconds: float = 30) -> bool:
    """Whether the process group empties in time; readers notice within five seconds that their parent is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path, started: Started) -> None:
    while not path.exists():
        assert started.is_alive(), started.output.read_text()
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ ranks


def test_two_ranks_killed_go_on_to_the_same_bits(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    for name in ("calm", "run"):
        arguments = student(shards, teacher_run, tmp_path / name, micro_batch_size=2)
        if name == "run":
            first, *_ = distill_on_ranks(arguments, tmp_path, 2, Kill("distill.engine:Engine.step", 8))
            assert first.code == -signal.SIGKILL
        for ended in distill_on_ranks(arguments, tmp_path, 2):
            ended.ok()
    assert rows(tmp_path / "run") == rows(tmp_path / "calm")
    assert weights(tmp_path / "run") == weights(tmp_path / "calm")


DEATHS = {
    "in a step": Kill("distill.engine:Engine.step", 3),
    "while it sends what the run leaves": Kill("distill.train:write_result", 1),
}


@pytest.mark.parametrize("when", DEATHS)
def test_peer_of_a_rank_that_dies_ends_within_a_minute_and_says_why(
    when: str, shards: Path, tmp_path: Path
) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run", steps=4)]
    dying, other = [
        Started(arguments, tmp_path / f"rank{environ['RANK']}.txt", environ, kill)
        for environ, kill in zip(rank_environs(2), [DEATHS[when], None], strict=True)
    ]
    assert dying.wait().code == -signal.SIGKILL
    ended = other.wait(60)
    assert ended.code not in (0, -signal.SIGKILL), ended.output
    assert re.search("Connection (closed|reset) by peer", ended.output), ended.output


def test_signal_to_one_rank_stops_all_after_the_same_step(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run")]
    kill = Kill("distill.engine:Engine.backward", 3, number=signal.SIGTERM)
    ended = distill_on_ranks(arguments, tmp_path, 2, kill)
    assert [e.code for e in ended] == [143, 143], ended[0].output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    said = distill(arguments, tmp_path).ok().output
    assert "saved by 2 rank(s) in ZeRO 1, dealt anew to 1 rank(s) in ZeRO 1" in said


# ------------------------------------------------------------------------------------------------ many kills


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_twenty_kills_at_random_moments_change_nothing(
    kind: str, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    long = {"steps": 500, "save__every": 7, "schedule__stages": [[0, 2], [40, 8], [77, 24]]}
    random.seed(kind)

    def arguments(run_dir: Path) -> list[str]:
        if kind == "student":
            return student(shards, teacher_run, run_dir, **long)
        return teacher(shards, run_dir, steps=500, save__every=7, save__trajectory_every=10)

    distill(arguments(tmp_path / "calm"), tmp_path).ok()
    for kills in range(20):
        started = Started(arguments(tmp_path / "run"), tmp_path / f"killed-{kills}.txt")
        checkpoints = tmp_path / "run" / "checkpoints"
        saved = set(checkpoints.glob("step_*/state.json"))
        while started.is_alive() and set(checkpoints.glob("step_*/state.json")) == saved:
            time.sleep(0.01)  # until there is progress, or twenty kills would never get anywhere
        time.sleep(random.uniform(0, 0.3))
        started.kill()
        assert started.wait().code == -signal.SIGKILL
    distill(arguments(tmp_path / "run"), tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")
    if kind == "teacher":
        assert trajectory(tmp_path / "run") == trajectory(tmp_path / "calm")


def test_adaptive_schedule_killed_after_a_decision_repeats_it(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    waits = {"kind": "saturation", "checkpoints": [2, 8, 24], "patience": 1, "min_gain": 1.0}
    changes: dict[str, Any] = {f"schedule__{key}": value for key, value in waits.items()}
    changes |= {"schedule__stages": [], "log__eval_every": 2}
    whole = tmp_path / "whole" / "run"
    whole.parent.mkdir()
    distill(student(shards, teacher_run, whole, **changes), tmp_path / "whole").ok()
    decided = json.loads((whole / "schedule.json").read_text())
    assert decided["stages"] == [[0, 2], [4 * 8, 8], [6 * 8, 24]]  # a gain of 1 is never reached

    # The second decision, of step 6, is on record and the newest checkpoint is of step 5.
    kill = Kill("distill.build:store_schedule", 2, before=False)
    killed(student(shards, teacher_run, tmp_path / "run", **changes), tmp_path, kill)
    assert json.loads((tmp_path / "run" / "schedule.json").read_text()) == decided
    distill(student(shards, teacher_run, tmp_path / "run", **changes), tmp_path).ok()
    assert_same_run(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "schedule.json").read_text()) == decided
