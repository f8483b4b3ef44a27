"""A job that a queue starts again and again gets two starts a step; another job, or another step, is free to start."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.__main__ import main
from distill.attempts import MOST_STOPS, Standstill, note_start, note_stop, refuse_standstill, saved_step
from distill.run_folder import STATE, checkpoint_folder


def save(run_dir: Path, step: int) -> None:
    checkpoint_folder(run_dir, step).mkdir(parents=True)
    (checkpoint_folder(run_dir, step) / STATE).touch()


def test_third_start_from_one_step_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert note_start(run_dir, "7") == 0
    refuse_standstill(run_dir, "7")
    assert note_start(run_dir, "7") == 0
    with pytest.raises(
        Standstill, match="job 7 has started .*run 2 times from step 0 and saved nothing since"
    ):
        refuse_standstill(run_dir, "7")
    with pytest.raises(Standstill):
        note_start(run_dir, "7")


def test_progress_or_another_job_starts_the_count_anew(tmp_path: Path) -> None:
    for _ in range(2):
        note_start(tmp_path, "7")
    refuse_standstill(tmp_path, "8")
    save(tmp_path, 40)
    assert [note_start(tmp_path, "7"), note_start(tmp_path, "7")] == [40, 40]
    with pytest.raises(Standstill, match="from step 40"):
        refuse_standstill(tmp_path, "7")


def test_start_that_was_told_to_stop_is_no_failure_but_ten_are_enough(tmp_path: Path) -> None:
    for _ in range(MOST_STOPS):
        note_start(tmp_path, "7")
        note_stop(tmp_path)
    with pytest.raises(Standstill, match="job 7 has started .* 10 times from step 0"):
        note_start(tmp_path, "7")
    note_start(tmp_path, "8")
    note_stop(tmp_path)
    note_start(tmp_path, "8")
    refuse_standstill(tmp_path, "8")
    note_start(tmp_path, "8")
    with pytest.raises(Standstill, match="job 8 has started .* 3 times"):
        refuse_standstill(tmp_path, "8")


def test_checkpoint_without_its_mark_is_no_progress(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path, 40).mkdir(parents=True)
    assert saved_step(tmp_path) == 0


def test_command_says_where_the_run_goes_on_and_refuses_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def attempt(when: str) -> int:
        arguments = ["distill", "attempt", when, f"run_dir={tmp_path}/run", "data.shards=s"]
        monkeypatch.setattr("sys.argv", arguments)
        return main()

    assert [attempt("start"), attempt("stopped")] == [0, 0]
    assert [attempt("start"), attempt("again"), attempt("start"), attempt("again")] == [0, 0, 0, 2]
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/run goes on from step 0\n" * 3
    assert "submit it again" in printed.err
