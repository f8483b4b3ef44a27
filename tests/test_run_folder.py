"""A run folder belongs to one run at a time and to one set of settings, once that is known to fit together."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import (
    LENGTH,
    TOKENIZER,
    Kill,
    Started,
    assert_same_run,
    config,
    distill,
    settings,
    text,
    write_tokenizer,
)

from data_prep.shards import write_shards
from distill.run_folder import (
    MAY_CHANGE,
    RunFolderError,
    claim,
    read_result,
    store_settings,
    write_result,
)
from distill.trajectory.index import index_trajectory


def test_second_run_into_the_same_folder_is_refused_while_the_first_is_under_way(
    shards: Path, tmp_path: Path
) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run", steps=100000)]
    first = Started(arguments, tmp_path / "first.txt")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.is_alive(), first.output.read_text()
    second = distill(arguments, tmp_path)
    assert second.code == 2
    assert f"is in use by process {first.pid} on" in second.output
    assert "wait for it or choose another run_dir" in second.output
    assert first.is_alive()  # unharmed
    first.kill()
    first.wait()


def test_folder_is_free_after_a_run_that_failed(tmp_path: Path) -> None:
    run = config(Path("shards"), tmp_path / "run")
    with pytest.raises(ZeroDivisionError), claim(run, True):
        raise ZeroDivisionError
    with claim(run, True) as folder:
        assert folder == tmp_path / "run"


def test_folder_is_bound_by_stored_settings_and_each_difference_is_named(tmp_path: Path) -> None:
    run = config(Path("shards"), tmp_path / "run")
    with claim(run, True) as folder:
        store_settings(folder, run, None, None)
    other = config(
        Path("shards"), tmp_path / "run", optim__lr=1.0, seed=9, model__overrides={"hidden_size": 8}
    )
    with pytest.raises(RunFolderError) as caught, claim(other, True):
        pass
    lines = str(caught.value).splitlines()
    assert "was started with other settings; choose another run_dir or go back to" in lines[0]
    assert [line.strip().split(":")[0] for line in lines[1:]] == ["seed", "model.overrides", "optim.lr"]
    assert "optim.lr: 0.003 -> 1.0" in str(caught.value)


def test_layout_speed_and_logging_may_change(tmp_path: Path) -> None:
    leaves: dict[str, Any] = {"save__trajectory_every": 8}
    with claim(config(Path("shards"), tmp_path / "run", **leaves), True) as folder:
        store_settings(folder, config(Path("shards"), tmp_path / "run", **leaves), None, None)
    changes: dict[str, Any] = {"micro_batch_size": 2, "data__num_workers": 1, "objective__chunk_rows": 7}
    changes |= {"objective__kernel": "reference", "save__every": 1, "save__keep": 9, "log__every": 1}
    changes |= {"log__eval_every": 1, "save__trajectory_to": "s3://bucket/teacher"}
    changes |= {"teacher__cache": "/cache", "teacher__cache_gb": 9.0, "teacher__zero_stage": 3}
    changes |= {"teacher__offload": True, "engine__zero_stage": 2, "engine__compile": True}
    changes |= {"engine__offload_optimizer": True, "engine__activation_checkpointing": True}
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    with claim(config(Path("elsewhere"), moved, **leaves, **changes), True):
        pass
    assert {key.replace("__", ".") for key in changes} | {
        "run_dir",
        "data.shards",
        "teacher.trajectory",
        "teacher.tokenizer",
    } == set(MAY_CHANGE)


def test_key_that_is_newer_than_the_stored_config_does_not_lock_a_run_out(tmp_path: Path) -> None:
    run = config(Path("shards"), tmp_path / "run")
    with claim(run, True) as folder:
        store_settings(folder, run, None, None)
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    del stored["optim"]["eps"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    with claim(run, True):
        pass


def test_temporary_files_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    left = [
        tmp_path / "run" / ".config.yaml.123.tmp",
        tmp_path / "run" / "trajectory" / ".manifest.json.9.tmp",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with claim(config(Path("shards"), tmp_path / "run"), True):
        assert not any(path.exists() for path in left)


def test_result_marks_a_run_as_done(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    write_result(tmp_path, {"step": 3})
    assert read_result(tmp_path) == {"step": 3}


def test_finished_run_says_its_result_again_and_touches_nothing(
    teacher_run: Path, shards: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(teacher_run, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "run.lock"}
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["run_dir"] = str(run)
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(stored))
    ended = distill(["train", str(tmp_path / "same.yaml")], tmp_path).ok()
    assert '"step": 24' in ended.output
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "run.lock"} == before


def test_other_samples_under_the_same_settings_are_refused(shards: Path, tmp_path: Path) -> None:
    splits = {"train": text(600, 77), "validation": text(40, 78)}
    write_shards(tmp_path / "other", splits, TOKENIZER, sequence_length=LENGTH)
    write_tokenizer(tmp_path / "other" / "tokenizer")
    stop = Kill("distill.engine:Engine.step", 7)
    assert distill(["train", *settings(shards, tmp_path / "run")], tmp_path, stop).code == -9
    ended = distill(["train", *settings(tmp_path / "other", tmp_path / "run")], tmp_path)
    assert ended.code == 2
    assert "was trained on other samples than data.shards holds now" in ended.output
    moved = shutil.copytree(shards, tmp_path / "moved")
    distill(["train", *settings(Path(moved), tmp_path / "run")], tmp_path).ok()


def test_teacher_of_the_same_steps_but_other_weights_is_refused_by_a_run_that_goes_on(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = {"steps": 4, "seed": 2, "save__trajectory_every": 8, "save__trajectory_first": 2}
    distill(["train", *settings(shards, tmp_path / "other", **changes)], tmp_path).ok()

    def student(trajectory: Path) -> list[str]:
        taught = {"teacher__trajectory": str(trajectory), "schedule__kind": "explicit"}
        return ["train", *settings(shards, tmp_path / "run", **taught, schedule__stages=[[0, 2], [9, 4]])]

    good = shutil.copytree(teacher_run / "trajectory", tmp_path / "trajectory")
    stop = Kill("distill.engine:Engine.step", 7)
    assert distill(student(good), tmp_path, stop).code == -9
    ended = distill(student(tmp_path / "other" / "trajectory"), tmp_path)
    assert ended.code == 2
    assert "was started with a teacher step 2 of sha256" in ended.output
    assert "other/trajectory has other weights there: go back to that trajectory" in ended.output
    shutil.move(good / "step_00000004", tmp_path / "later")
    index_trajectory(good)
    ended = distill(student(good), tmp_path)
    assert ended.code == 2
    assert "teacher step 4 of sha256" in ended.output and "lacks it" in ended.output
    shutil.move(tmp_path / "later", good / "step_00000004")
    index_trajectory(good)
    distill(student(good), tmp_path).ok()


# ------------------------------------------------------------------------------------------------ the disk


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; only root may make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root's right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_folder_without_write_permission_is_named(tmp_path: Path, shards: Path) -> None:
    with mounted(tmp_path / "closed", "ro,size=1m") as closed:
        ended = distill(["train", *settings(shards, closed / "run")], tmp_path)
    assert ended.code == 2
    assert f"run_dir {closed / 'run'} can't be written" in ended.output
    assert "Traceback" not in ended.output


# What is written when the disk is full -> a free number of bytes at which that fails.
FULL = {"resumable checkpoint": 150_000, "trajectory checkpoint": 40_000, "row of metrics": 0}


@pytest.mark.parametrize("what", FULL)
def test_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_when_there_is_space(
    what: str, tmp_path: Path, shards: Path
) -> None:
    changes = {"save__trajectory_every": 6} if what == "trajectory checkpoint" else {}
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    with mounted(tmp_path / "disk", "size=6m") as disk:
        arguments = ["train", *settings(shards, disk / "run", **changes)]
        stop = Kill("distill.train:train_step", 6)
        assert distill(arguments, tmp_path, stop).code == -9
        leave_free(disk, FULL[what])
        ended = distill(arguments, tmp_path)
        assert ended.code == 2, ended.output
        assert "No space left on device" in ended.output or "MB are free there" in ended.output
        assert not list((disk / "run").rglob("*.tmp"))
        assert "Traceback" not in ended.output
        assert [p.name for p in (disk / "run" / "checkpoints").glob("*/state.json")] == ["state.json"]
        (disk / "filler").unlink()
        distill(arguments, tmp_path).ok()
        assert_same_run(disk / "run", tmp_path / "calm")


def leave_free(disk: Path, free: int) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler:
        while shutil.disk_usage(disk).free > free:
            filler.write(bytes(max(4096, min(65536, shutil.disk_usage(disk).free - free))))


def test_run_dir_that_is_a_file_is_named(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "file").touch()
    ended = distill(["train", *settings(shards, tmp_path / "file")], tmp_path)
    assert ended.code == 2
    assert f"run_dir {tmp_path / 'file'} can't be written" in ended.output
