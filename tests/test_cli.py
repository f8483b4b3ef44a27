"""The `distill` command: help without torch, exit codes, one sentence an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, distill, settings

from distill.config import Config, fields_of


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True)


def test_help_of_training_lists_every_key_with_its_default() -> None:
    shown = python("-m", "distill", "train", "--help")
    assert shown.returncode == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    for key, field, value in fields_of(Config()):
        assert repr(value) in lines[key]
        assert field.metadata["help"] in lines[key]
    assert "143 SIGTERM" in shown.stdout


def test_help_and_config_errors_import_no_torch() -> None:
    script = """if True:
        import sys
        from distill.__main__ import main
        for arguments in (["--help"], ["train", "--help"], ["export", "--help"], ["train", "stepz=1"]):
            sys.argv = ["distill", *arguments]
            try:
                code = main()
            except SystemExit as end:
                code = end.code
            print(code, "torch" in sys.modules, file=sys.stderr)
    """
    shown = python("-c", script)
    codes = [line for line in shown.stderr.splitlines() if line.endswith("False")]
    assert codes == ["0 False", "0 False", "0 False", "2 False"], shown.stderr


def test_config_errors_come_all_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    shown = python(
        "-m",
        "distill",
        "train",
        f"run_dir={tmp_path / 'run'}",
        "stepz=3",
        "optim.learning=1",
        "data.task=clm",
    )
    assert shown.returncode == 2
    assert "the config has 2 problem(s)" in shown.stderr
    assert "unknown key stepz; did you mean steps?" in shown.stderr
    assert "unknown key optim.learning" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["trane"], ["export"], ["trajectory"], ["train", "--steps=3"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert python("-m", "distill", *arguments).returncode == 2


def test_yaml_file_and_assignments_make_a_run(shards: Path, tmp_path: Path) -> None:
    lines = settings(shards, tmp_path / "ignored", steps=2)
    (tmp_path / "run.yaml").write_text("seed: 4\noptim: {lr: 0.1}\n")
    ended = distill(
        ["train", str(tmp_path / "run.yaml"), *lines, f"run_dir={tmp_path / 'run'}"], tmp_path
    ).ok()
    assert ended.output.splitlines()[-1].startswith('{"step": 2, "samples": 16')
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "seed: 4" in stored
    assert "lr: 0.003" in stored  # assignments win over files


def test_missing_files_and_folders_are_named_without_a_traceback(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for arguments in (
        ["train", f"{nowhere}.yaml", "run_dir=x", "data.shards=y"],
        ["trajectory", "index", nowhere],
        ["export", nowhere, "--out", str(tmp_path / "out")],
        ["eval", nowhere, f"data.shards={nowhere}"],
    ):
        ended = distill(arguments, tmp_path)
        assert ended.code == 2, ended.output
        assert nowhere in ended.output
        assert "Traceback" not in ended.output


def test_indexing_says_what_it_found(teacher_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(teacher_run / "trajectory", tmp_path / "trajectory")
    ended = distill(["trajectory", "index", str(copy)], tmp_path).ok()
    assert ended.output.strip() == "distill: 5 checkpoints, steps [2, 4, 8, 16, 24]"
